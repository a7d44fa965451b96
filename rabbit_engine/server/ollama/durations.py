"""How long a model stays loaded, as Ollama's clients write it: seconds, or Go's durations such as "5m" and "1h30m"."""

from __future__ import annotations

import math
import re

from rabbit_engine.server.hosting import FOREVER

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_WHOLE = re.compile(rf"({_PART.pattern})+")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")

_LONGEST_S = 1e9
"""About 31 years."""


def read_duration(given: object) -> float | None:
    """Seconds; a negative duration is forever, None is None. Raises ValueError."""
    if given is None or given == "":
        return None
    if isinstance(given, str):
        text = given.strip()
        seconds = _spelled(text[1:] if text.startswith(("+", "-")) else text)
        return FOREVER if text.startswith("-") and seconds else _limited(seconds)
    if isinstance(given, bool) or not isinstance(given, int | float) or given != given:
        raise ValueError('expected seconds, or a duration such as "5m"')
    return FOREVER if given < 0 else _limited(given)


def _spelled(text: str) -> float:
    if _NUMBER.fullmatch(text):
        return float(text)
    if not _WHOLE.fullmatch(text):
        raise ValueError(f'{text[:40]!r} is not a duration: write "30s", "5m", "1h30m", or -1 for ever')
    return math.fsum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(text))


def _limited(seconds: float) -> float:
    return FOREVER if seconds > _LONGEST_S else float(seconds)
