"""How the fields of a request are handled that its model does not have: refused, ignored, or logged because they are unknown."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rabbit_engine.server.errors import RequestError
from rabbit_engine.sessions.spelling import nearest

logger = logging.getLogger(__name__)

_OFF: tuple[Any, ...] = (None, "", [], {}, False)
"""Values with which a refused field has no effect."""

_MOST_UNKNOWN = 32


@dataclass(frozen=True, slots=True)
class FieldTable:
    """`refused` has, for each name, the reason and values without effect besides those of `_OFF`; `prefix` goes before names
    in errors. An unknown field is refused if it looks like a misspelt one, and logged otherwise."""

    refused: Mapping[str, tuple[str, tuple[Any, ...]]]
    ignored: frozenset[str]
    prefix: str = ""

    def check(self, given: Mapping[str, Any], own: Collection[str]) -> None:
        """Raise RequestError for a field that would change the answer and is not among its `own`."""
        unknown = [name for name in given if name not in own and name not in self.refused and name not in self.ignored]
        if len(unknown) > _MOST_UNKNOWN:
            raise RequestError(400, f"there are {len(unknown)} unknown fields: {self.prefix}{unknown[0][:60]} is one")
        for name, (why, neutral) in self.refused.items():
            value = given.get(name)
            if name not in own and not _is_off(value) and value not in neutral:
                raise RequestError(400, f"{self.prefix}{name} is not supported: {why}", param=self.prefix + name)
        for name in unknown:
            if given[name] is not None:
                self._meet(name, own)

    def _meet(self, name: str, own: Collection[str]) -> None:
        shown = self.prefix + name[:60]
        if near := nearest(name, [*(other for other in own if other != "model"), *self.refused]):
            raise RequestError(400, f"{shown!r} is not a field of this request: did you mean {near!r}?", param=shown)
        tell_once(f"a request has the unknown field {shown!r}: it has no effect")


def _is_off(value: object) -> bool:
    return any(value == off and type(value) is type(off) for off in _OFF)


@lru_cache(maxsize=128)
def tell_once(text: str) -> None:
    """Log a warning, unless it was logged lately."""
    logger.warning("%s", text)
