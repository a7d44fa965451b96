"""Finds the known name closest to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_CHARACTERS = 60


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.8) -> str | None:
    """The known name closest to `name`, ignoring case and punctuation; None if none is close."""
    squashed = {_squash(other): other for other in known}
    found = difflib.get_close_matches(_squash(name), squashed, n=1, cutoff=cutoff)
    return squashed[found[0]] if found else None


def _squash(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())[:_MOST_CHARACTERS]
