"""The option of several commands for the prefix store, which is on by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from rabbit_engine.cli import engine
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.utils.sizes import parse_bytes

OFF = "off"
_CLOSE_S = 5.0
"""How long a command waits at its end for the disk."""


def _check_size(text: str | None) -> str | None:
    """A size or "off"."""
    try:
        _asked_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(f'{text} is not a size: write "20GB", or "{OFF}"') from error
    return text


def _asked_bytes(text: str | None) -> int | None:
    """The size that was asked for, 0 for "off"; None for the default. Raises ValueError for another text."""
    return None if text is None else 0 if text.strip().lower() == OFF else parse_bytes(text)


PrefixStoreSize = Annotated[
    str | None,
    typer.Option(
        callback=_check_size,
        metavar="SIZE|off",
        help=(
            "Disk for what was computed for prompts, in HF_HOME/rabbit_engine/prefixes: beginnings seen before are read, not "
            "computed. Only you may read the files (mode 0600), which hold the texts' tokens; `rabbit cache clear` deletes them."
        ),
        show_default="the smaller of 10GB and a tenth of the free disk",
    ),
]


def require_folder(size: str | None) -> int | None:
    """The bytes that were asked for, as `_asked_bytes`. Raises ConfigurationError for some where there is no folder."""
    asked = _asked_bytes(size)
    if asked and engine.prefixes.default_folder() is None:
        raise ConfigurationError(
            "--prefix-store needs a folder, and RABBIT_ENGINE_PREFIXES or RABBIT_ENGINE_CACHE is empty: set one, or leave it out"
        )
    return asked


@contextmanager
def opened_store(size: str | None, *, repeated_only: bool = False) -> Iterator[engine.prefixes.PrefixStore | None]:
    """The store in the default folder, closed at the end; None if it is off.

    One that was not asked for is off where there is no folder, and what goes wrong with it is no warning. Raises
    ConfigurationError if it was asked for and there is no folder.
    """
    asked = require_folder(size)
    store = engine.prefixes.open_default(asked, repeated_only=repeated_only)
    if store is None:
        yield None
        return
    try:
        yield store
    finally:
        store.close(_CLOSE_S)
