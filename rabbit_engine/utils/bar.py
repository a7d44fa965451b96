"""A progress bar for terminals and notebooks."""

from __future__ import annotations

from tqdm.auto import tqdm


class Bar(tqdm):  # type: ignore[type-arg]
    """tqdm's own for where the code runs, without its monitor thread: whoever starts a thread ends it."""

    monitor_interval = 0
