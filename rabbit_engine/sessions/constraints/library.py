"""The library that computes which tokens may follow: llguidance, an optional package."""

from __future__ import annotations

import json
import re
from types import ModuleType

from rabbit_engine.errors import first_line
from rabbit_engine.utils.extras import missing_extra

TOO_COMPLEX = "it is too complex"

_TOO_MUCH = re.compile("fuel|too many expressions|schema too large|too big|nested|recursion limit|max is")
_UNSUPPORTED = re.compile(r"Unimplemented keys: (\[.*\])")


def open_library() -> ModuleType:
    """The package llguidance. Raises MissingExtraError."""
    try:
        import llguidance
    except ImportError as error:
        raise missing_extra("constrained decoding", "structured", error) from error
    return llguidance


def worded(error: str) -> str:
    """The library's reason in one line."""
    if found := _UNSUPPORTED.search(error):
        return f"{', '.join(json.loads(found[1]))} is not supported"
    if "NoExtension" in error:
        return "no text of this model's tokens satisfies it"
    if _TOO_MUCH.search(error):
        return TOO_COMPLEX
    lines = [line.strip() for line in error.splitlines()]
    stated = next((line for line in lines if line.startswith("error: ")), None)  # of a regex; the first line only quotes it
    return stated.removeprefix("error: ") if stated else first_line(ValueError(error))
