"""Texts of a session that begin alike: one computes the beginning, the others wait for that pass and copy it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache

from rabbit_engine.sessions.known_prefixes import KnownPrefixes, KnownText

_LEAST_BLOCKS = 2
"""Fewer common blocks are not worth a pass."""

_MOST_WAITS = 3
"""Passes for which a text waits at most: the text that it waits for may fail, or begin with another one of its own."""


class Beginning:
    """That of a request's prompt. It waits where others compute it, and others may wait for what it computes."""

    def __init__(self, prefixes: KnownPrefixes, ids: Sequence[int]) -> None:
        self._prefixes, self._ids = prefixes, ids
        self._waits = 0
        self._awaited: KnownText | None = None
        self._known: KnownText | None = None

    def waits(self) -> bool:
        """Whether the request should begin after the next pass: another text computes blocks in it with which it begins, too."""
        if self._waits == _MOST_WAITS or (other := self._prefixes.computing(self._ids, _LEAST_BLOCKS)) is None:
            return False
        self._waits += 1
        self._await(other)
        return True

    def begin(self, cache: DynamicCache | None, begun: int = 0) -> KnownText | None:
        """`KnownPrefixes.begin`: what it waited for is copied."""
        self._known = self._prefixes.begin(self._ids, cache, begun)
        self._await(None)
        return self._known

    @property
    def stored_tokens(self) -> int:
        """`KnownPrefixes.stored_tokens`."""
        return self._prefixes.stored_tokens(self._ids)

    def end(self) -> None:
        """The answer has ended, or will not begin."""
        self._await(None)
        if self._known is not None:
            self._known.end()

    @property
    def follows(self) -> bool:
        """Whether it waits for another text."""
        return self._awaited is not None

    @property
    def is_awaited(self) -> bool:
        """Whether others wait to copy what it computed. Its cache stays in memory until then."""
        return self._known is not None and self._known.is_awaited

    def give_up(self) -> None:
        """Drop the cache, whoever waits for it."""
        if self._known is not None:
            self._known.drop()

    def _await(self, other: KnownText | None) -> None:
        if other is self._awaited:
            return
        if self._awaited is not None:
            self._awaited.leave(self)
        if other is not None:
            other.await_by(self)
        self._awaited = other
