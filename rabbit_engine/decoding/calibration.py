"""Learns what a draft's probabilities are worth, and what its trees usually bring."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rabbit_engine.decoding.tree import Tree

_FADING = 0.95
"""What a verdict counts after the next one."""

_PRIOR_TOKENS = 2.0
"""Expected tokens after which what was counted weighs as much as what was believed before."""

_LEAST_TRUST, _MOST_TRUST = 1 / 16, 4.0

_KINDS = 4
"""Probabilities are trusted by octave: over a half, over a quarter, over an eighth, and the others."""


class Calibration:
    """The factors between a draft's probabilities and the shares of its guesses that come true."""

    def __init__(self) -> None:
        self._expected = [0.0] * _KINDS
        self._came = [0.0] * _KINDS

    def add(self, tree: Tree, path: Sequence[int]) -> None:
        """Learn which nodes of a tree the text took."""
        self._expected = [_FADING * value for value in self._expected]
        self._came = [_FADING * value for value in self._came]
        for probability in tree.probabilities:
            self._expected[_kind_of(probability)] += probability
        for node in path:
            self._came[_kind_of(tree.probabilities[node])] += 1

    @property
    def trust(self) -> float:
        """The factor over all probabilities."""
        return _ratio(sum(self._came), sum(self._expected), 1.0)

    def corrected(self, probabilities: Sequence[float]) -> list[float]:
        """What they are worth."""
        factors = self._factors()
        return [min(1.0, probability * factors[_kind_of(probability)]) for probability in probabilities]

    def hopeful(self, probabilities: Sequence[float]) -> list[float]:
        """What they are worth if the text has become easier to guess: at least as much as the draft says."""
        return [max(pair) for pair in zip(self.corrected(probabilities), probabilities, strict=True)]

    def _factors(self) -> list[float]:
        return [_ratio(came, expected, self.trust) for came, expected in zip(self._came, self._expected, strict=True)]


def _kind_of(probability: float) -> int:
    return min(_KINDS - 1, int(-math.log2(probability)))


def _ratio(came: float, expected: float, prior: float) -> float:
    found = (came + _PRIOR_TOKENS * prior) / (expected + _PRIOR_TOKENS)
    return min(max(found, _LEAST_TRUST), _MOST_TRUST)


class UsualGain:
    """`gains`: the tokens that the best n nodes of a tree usually add to a pass, for each n of `sizes`: 1, 2, 4 and so on."""

    _SHARE = 1 / 4
    """Of the newest tree."""

    def __init__(self, most: int) -> None:
        self.sizes = tuple(1 << power for power in range(most.bit_length()))
        self.gains = [0.0] * len(self.sizes)
        self._trees = 0

    def add(self, probabilities: Sequence[float], asked: int) -> None:
        """Learn from a tree's probabilities, the likeliest first, of at most `asked` nodes.

        Larger sizes are expected to add with each doubling what the last one added.
        """
        found = [sum(probabilities[:size]) for size in self.sizes if size <= max(1, asked)]
        while len(found) < len(self.sizes):
            found.append(2 * found[-1] - (found[-2] if len(found) > 1 else 0.0))
        known = self.gains if self._trees else found
        self.gains = [before + self._SHARE * (now - before) for before, now in zip(known, found, strict=True)]
        self._trees += 1

    def gain(self, size: int) -> float:
        """That of the largest of `sizes` up to this one; 0 for size 0."""
        return self.gains[min(size.bit_length(), len(self.sizes)) - 1] if size else 0.0
