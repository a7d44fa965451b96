"""Where the end of a text occurred before in it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

_SLOTS = 2**15
"""Chains of an order; longer texts have longer chains, not more."""

LONGEST = 32
"""Tokens of a match that are compared: longer ones say no more."""


class Occurrences:
    """Positions of a text by the tokens before them: hash chains, as deflate finds its matches.

    They take 8 bytes a token and two tables of 128 KiB; a token is added in constant time.
    """

    def __init__(self) -> None:
        self._text = array("i")
        self._chains = {order: _Chain() for order in (1, 3)}

    def __len__(self) -> int:
        return len(self._text)

    def __getitem__(self, position: int) -> int:
        return self._text[position]

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on with `tokens`."""
        for token in tokens:
            for order, chain in self._chains.items():
                chain.append(tuple(self._text[-order:]))
            self._text.append(token)

    def matches_of_end(self, most: int) -> list[tuple[int, int]]:
        """(tokens that match, position after them) of earlier occurrences of the text's end: longest first, then newest."""
        found: dict[int, int] = {}
        for order in (3, 1):
            for position in self._after(self._text[-order:], most):
                found.setdefault(position, self._common(position))
        return sorted(((length, position) for position, length in found.items()), reverse=True)

    def positions_after(self, token: int, most: int) -> list[int]:
        """The newest positions after `token`."""
        return list(self._after((token,), most))

    def _after(self, tokens: Sequence[int], most: int) -> Iterator[int]:
        """The newest positions after `tokens`, as long as the chain of that order: up to `most` of those with their hash."""
        order = len(tokens)
        if order not in self._chains:
            return
        wanted = array("i", tokens)
        for position in self._chains[order].newest(tuple(tokens), most):
            if position >= order and self._text[position - order : position] == wanted:
                yield position

    def _common(self, position: int) -> int:
        """How many tokens before `position` are those of the text's end."""
        text, end, most = self._text, len(self._text), min(LONGEST, position)
        length = 0
        while length < most and text[position - 1 - length] == text[end - 1 - length]:
            length += 1
        return length


class _Chain:
    """Positions 0, 1, 2... by a key of each, newest first."""

    def __init__(self) -> None:
        self._heads = array("i", [-1]) * _SLOTS
        self._older = array("i")

    def append(self, key: tuple[int, ...]) -> None:
        slot = hash(key) % _SLOTS
        self._older.append(self._heads[slot])
        self._heads[slot] = len(self._older) - 1

    def newest(self, key: tuple[int, ...], most: int) -> Iterator[int]:
        """Up to `most` positions with the hash of that key."""
        position = self._heads[hash(key) % _SLOTS]
        while position >= 0 and most:
            yield position
            position, most = self._older[position], most - 1
