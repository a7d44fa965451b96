"""How many texts at a time: what their caches may take, and what they take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rabbit_engine.planning.demand import Demand, most_prompt, need_bytes
from rabbit_engine.planning.probe import Probe

_KEPT_FREE = 0.1
"""Of what is free when a session begins: fragments, and whatever else runs."""


_USUAL_POSITIONS = 2**15
"""Where neither the config nor memory bounds a text."""


@dataclass(frozen=True, slots=True)
class Room:
    """`nbytes` for the caches of all texts under way and the activations of those whose prompts a pass computes;
    `positions` of the model's own."""

    nbytes: int
    probe: Probe
    positions: int | None = None

    def need(self, demands: Iterable[Demand]) -> int:
        """Bytes: every cache grows to its end, and a pass holds what lives of all its texts: they wait for the same weights."""
        return sum(need_bytes(self.probe, demand) for demand in demands)

    def fits(self, demands: Iterable[Demand]) -> bool:
        """Whether all of them can be under way at a time."""
        return self.need(demands) <= self.nbytes

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer that a single text may have."""
        most = self.positions if self.positions is not None else _USUAL_POSITIONS
        return most_prompt(lambda tokens: self.fits([Demand(tokens, 0)]), most)


def measure_room(free_bytes: int, probe: Probe, positions: int | None) -> Room:
    """What is free now, less a margin."""
    return Room(int(free_bytes * (1 - _KEPT_FREE)), probe, positions)
