"""A progress bar for terminals and notebooks."""

from __future__ import annotations

from tqdm.auto import tqdm


class Bar(tqdm):  # type: ignore[type-arg]
    """tqdm's bar for the environment that the code runs in, without its monitor thread, which would outlive the bar."""

    monitor_interval = 0
