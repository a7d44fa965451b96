"""How likely a guess is right, learnt from the guesses before it."""

from __future__ import annotations

import math
from collections.abc import Sequence

_RATE = 0.05
"""Larger ones follow a text's latest turn, and are wrong more often: 0.1 loses what learning gains."""


class Odds:
    """Logistic regression with one step of gradient descent for each outcome.

    Features should lie in [0, 1]: they are then learnt at the same rate.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = list(weights)

    def probability(self, features: Sequence[float]) -> float:
        """In (0, 1)."""
        return 1 / (1 + math.exp(-sum(map(float.__mul__, self._weights, features))))

    def learn(self, features: Sequence[float], right: bool) -> None:
        """A guess with these features was right or wrong."""
        step = _RATE * (right - self.probability(features))
        self._weights = [weight + step * feature for weight, feature in zip(self._weights, features, strict=True)]
