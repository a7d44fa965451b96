"""The option of several commands for the prefix store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from rabbit_engine.cli import engine
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.utils.sizes import parse_bytes


def _check_size(text: str | None) -> str | None:
    """Bytes above zero."""
    try:
        if text is not None and parse_bytes(text) <= 0:
            raise typer.BadParameter(f"{text}: the size must be above zero")
    except ValueError as error:
        raise typer.BadParameter(f'{text} is not a size: write "20GB"') from error
    return text


PrefixStoreSize = Annotated[
    str | None,
    typer.Option(
        callback=_check_size,
        metavar="SIZE",
        help="Keep what was computed for prompts on disk, up to this size: beginnings seen before are read (see `rabbit cache`).",
    ),
]


@contextmanager
def opened_store(size: str | None) -> Iterator[engine.prefixes.PrefixStore | None]:
    """The store in the default folder, closed at the end; None without a size. Raises ConfigurationError without a folder."""
    if size is None:
        yield None
        return
    folder = engine.prefixes.default_folder()
    if folder is None:
        raise ConfigurationError(
            "--prefix-store needs a folder, and RABBIT_ENGINE_PREFIXES or RABBIT_ENGINE_CACHE is empty: set one, or leave it out"
        )
    with engine.prefixes.PrefixStore(folder, parse_bytes(size)) as store:
        yield store
