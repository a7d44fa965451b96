"""Reads small JSON files of a checkpoint; what is wrong with one names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rabbit_engine.errors import DamagedCheckpointError, RabbitError, first_line
from rabbit_engine.storage.directio import damage_as, disk_errors, open_unchanged
from rabbit_engine.storage.jsonvalues import parse


@contextmanager
def parsed(path: Path) -> Iterator[Any]:
    """The JSON of a file; an error in it, or a ValueError from reading its values within, names the file.

    Raises DamagedCheckpointError.
    """
    try:
        with damage_as(DamagedCheckpointError), open_unchanged(path, None) as file, disk_errors(path):
            raw = file.read()
        yield parse(raw)
    except RabbitError:
        raise
    except ValueError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({first_line(error)}): download it again") from error
