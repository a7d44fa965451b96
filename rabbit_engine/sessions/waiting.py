"""Estimates how long a request waits, from what the passes so far took."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class AnswerLength:
    """The mean number of passes of the answers so far, newer ones counting more; they seldom use all the tokens they may."""

    mean: float = 0.0

    def add(self, passes: int) -> None:
        """Count an answer that has ended."""
        self.mean = float(passes) if not self.mean else 0.8 * self.mean + 0.2 * passes

    def left(self, most: int, passes: int = 0) -> float:
        """The passes that an answer of at most that many tokens still needs after so many passes."""
        expected = min(float(most), self.mean) if self.mean else most / 2
        return max(1.0, expected - passes)


def passes_until_start(running: Sequence[float], waiting: Sequence[float], most: int) -> float:
    """The passes until one more request starts, behind all that wait; 0 for the next pass.

    `running` are the passes that each answer under way needs, `waiting` those of each request that has not started. At most
    `most` run at once, or as many as run now while others wait: then memory limits them.
    """
    places = len(running) if running and waiting else most
    ends = [*running, *[0.0] * (places - len(running))]
    heapq.heapify(ends)
    for passes in waiting:
        heapq.heappush(ends, heapq.heappop(ends) + passes)
    return ends[0]
