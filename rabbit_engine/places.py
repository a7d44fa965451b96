"""Names of models that are paths of this machine: told from repo ids of the Hub, and refused where nothing lies. No torch."""

from __future__ import annotations

import difflib
from pathlib import Path

from rabbit_engine.errors import CheckpointNotFoundError


def is_path(name: str) -> bool:
    """Whether it cannot be a repo id, `organisation/name` or `name`."""
    if "://" in name:
        return False
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith((".gguf", "/"))


def require_present(name: str) -> None:
    """Raise CheckpointNotFoundError for a path where nothing is, naming what is closest to it, and for a file of a folder."""
    path = Path(name).expanduser()
    if path.is_dir() or not is_path(name):
        return
    if path.is_file():
        if path.suffix == ".gguf":
            return
        raise CheckpointNotFoundError(f"{name} is a file: give its folder, {path.parent}")
    raise CheckpointNotFoundError(f"{name} does not exist{_advice(path)}")


def _advice(path: Path) -> str:
    """What is closest to the first part of the path that is missing."""
    missing = path
    while not missing.parent.is_dir() and missing != missing.parent:
        missing = missing.parent
    try:
        names = [entry.name for entry in missing.parent.iterdir()]
    except OSError as error:
        return f": {missing.parent} cannot be read ({error.strerror})"
    close = difflib.get_close_matches(missing.name, names, n=1)
    if close:
        return f": did you mean {missing.parent / close[0] / path.relative_to(missing)}?"
    there = "" if missing == path else f" (there is no {missing})"
    return f"{there}: give a folder, a .gguf file, or a repo id (organisation/name)"
