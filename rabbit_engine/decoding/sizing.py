"""The size of a tree that gives the most tokens a second. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

LEAST_GAIN = 1.05
"""A tree must promise this many times the tokens a second of plain decoding: less is within the error of the measurements."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a pass with a tree of some size is expected to give a text: tokens, and the seconds of the pass and the draft.

    Of a pass that several texts share, each counts its part of the seconds. Size 0 is a plain pass.
    """

    tokens: Callable[[int], float]
    seconds: Callable[[int], float]

    @classmethod
    def of(
        cls, probabilities: Sequence[float], seconds_of_rows: Callable[[int], float], draft_s: float = 0.0, texts: int = 1
    ) -> Self:
        """That of the best nodes of a tree, whose `probabilities` are in descending order.

        n nodes add the sum of the first n to the one token of a pass, which has a row for each node and one for each of the
        `texts` that share it. The others are expected to bring as many nodes and to draft as long.
        """
        gains = [0.0, *accumulate(probabilities)]
        return cls(lambda size: 1 + gains[size], lambda size: seconds_of_rows(texts * (1 + size)) / texts + draft_s)

    def rate(self, size: int) -> float:
        """Tokens a second."""
        return self.tokens(size) / self.seconds(size)

    def best(self, sizes: Sequence[int]) -> int:
        """The size with the highest rate, the smallest of equals."""
        return max(sizes, key=lambda size: (self.rate(size), -size))

    def pays(self, size: int) -> bool:
        """Whether it promises LEAST_GAIN."""
        return self.rate(size) >= LEAST_GAIN * self.rate(0)

    def best_that_pays(self, sizes: Sequence[int]) -> int:
        """The size with the highest rate; 0 if none pays."""
        best = self.best(sizes)
        return best if self.pays(best) else 0


def sizes_up_to(most: int) -> list[int]:
    """0 to 16, then in steps of an eighth: near the best size, rates differ little."""
    found = list(range(min(most, 16) + 1))
    while found[-1] < most:
        found.append(min(most, found[-1] * 9 // 8))
    return found
