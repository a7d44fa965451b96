"""How many texts at a time: what their caches may take, and what they do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from rabbit_engine.budget import reserved_bytes
from rabbit_engine.plan import Plan
from rabbit_engine.probe import Probe
from rabbit_engine.utils.platform import free_memory_bytes

_KEPT_FREE = 0.1
"""Of what is free when a session begins: fragments, and whatever else runs."""


_USUAL_POSITIONS = 2**15
"""Where neither the config nor memory bounds a text."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Tokens of a request: its prompt's, and as many as its answer may have."""

    prompt: int
    answer: int


@dataclass(frozen=True, slots=True)
class Room:
    """`nbytes` for the caches of all texts under way and the activations of one prompt; `positions` of the model's own."""

    nbytes: int
    probe: Probe
    positions: int | None = None

    def need(self, demands: Iterable[Demand]) -> int:
        """Bytes: every cache grows to its end, while prompts are computed one at a time."""
        demands = list(demands)
        caches = sum(self.probe.cache_token_bytes * (demand.prompt + demand.answer) for demand in demands)
        longest = max((demand.prompt for demand in demands), default=0)
        return caches + reserved_bytes(self.probe, longest) - self.probe.cache_token_bytes * longest

    def fits(self, demands: Iterable[Demand]) -> bool:
        """Whether all of them can be under way at a time."""
        return self.need(demands) <= self.nbytes

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer that a single text may have."""
        most = self.positions if self.positions is not None else _USUAL_POSITIONS
        if self.fits([Demand(most, 0)]):
            return most
        least, most = 0, most
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if self.fits([Demand(middle, 0)]) else (least, middle)
        return least


def measure_room(plan: Plan, probe: Probe, device: torch.device, positions: int | None) -> Room:
    """What is free now, less a margin; at least what the plan set aside for it."""
    free = int(free_memory_bytes(device) * (1 - _KEPT_FREE))
    return Room(max(plan.budget.reserved_bytes, free), probe, positions)
