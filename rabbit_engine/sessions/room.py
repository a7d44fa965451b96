"""How many texts can run at once: the memory available for their caches, and what each needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from rabbit_engine.errors import PromptTooLongError
from rabbit_engine.planning.demand import AS_IT_IS, PART_ROWS, Demand, Ways, best_way, most_prompt, need_bytes
from rabbit_engine.planning.probe import Probe
from rabbit_engine.utils.sizes import format_bytes

_KEPT_FREE = 0.1
"""The fraction of free memory left for fragmentation and other processes."""


_USUAL_POSITIONS = 2**15
"""The limit of a text if neither the config nor memory sets one."""


@dataclass(frozen=True, slots=True)
class Room:
    """`nbytes` for the caches of all texts under way and the activations of the prompts in a pass; `positions` of the model, of
    which an answer has as many again if an encoder reads the prompt `apart`. A prompt that does not fit whole may be computed
    in `parts`."""

    nbytes: int
    probe: Probe
    positions: int | None = None
    apart: bool = False
    ways: Ways = AS_IT_IS
    held_bytes: int = 0

    def beside(self, held_bytes: int) -> Room:
        """What is left of it beside the prefixes of forks, which hold so much."""
        return replace(self, nbytes=self.nbytes - held_bytes, held_bytes=held_bytes) if held_bytes else self

    def require_beside_forks(self, demand: Demand) -> None:
        """Raise PromptTooLongError if it does not fit, and forks hold memory."""
        if self.held_bytes and not self.fits([demand]):
            needed, held, left = (format_bytes(max(0, each)) for each in (self.need([demand]), self.held_bytes, self.nbytes))
            raise PromptTooLongError(
                f"{demand.prompt} tokens and {demand.answer} of the answer need {needed}, but forks hold {held} and leave {left}"
                ": close them, shorten the prompt, or request a shorter answer"
            )

    def demand_after(self, held: Demand, tokens: int, prompt: int, answer: int) -> Demand:
        """That of a text whose first `tokens` tokens are held with the demand `held`. Raises PromptTooLongError."""
        whole = replace(held, prompt=prompt, answer=answer, begun=tokens, chunk=None)
        chunks = [None, *(rows for rows in PART_ROWS if rows < prompt - tokens and self.ways.parts)]
        tried = [replace(whole, chunk=rows) for rows in chunks]
        found = next((demand for demand in tried if self.fits([demand])), tried[-1])
        self.require_beside_forks(found)
        return found

    def demand(self, prompt: int, answer: int) -> Demand:
        """That of a text, in one of the ways if it does not fit as it is. One whose cache lies in tiers leaves half of the memory
        to other texts, if it can."""
        found = best_way(self.probe, Demand(prompt, answer), self.nbytes, self.ways)
        if not found.in_tiers or found.held:
            return found
        smaller = best_way(self.probe, Demand(prompt, answer), self.nbytes // 2, self.ways)
        if found.encoded:
            return smaller if self.fits([smaller]) else found
        return smaller if smaller.in_tiers else replace(found, tiered=self.probe.growing_layers)

    def need(self, demands: Iterable[Demand]) -> int:
        """Bytes: each cache at its full length, and the activations of all texts in a pass, which wait for the same weights."""
        return sum(need_bytes(self.probe, demand) for demand in demands)

    def fits(self, demands: Iterable[Demand]) -> bool:
        """Whether all of them can be under way at once."""
        return self.need(demands) <= self.nbytes

    @property
    def most_tokens(self) -> int:
        """The most tokens of prompt and answer for a single text."""
        most = self.positions if self.positions is not None else _USUAL_POSITIONS
        return most_prompt(lambda tokens: self.fits([self.demand(tokens, tokens if self.apart else 0)]), most)

    def most_tokens_of(self, demand: Callable[[int], Demand], most: int | None) -> int:
        """The most tokens of a single text, up to `most`, given the demand of one of n tokens."""
        limits = [limit for limit in (most, self.positions) if limit is not None]
        return most_prompt(lambda tokens: self.fits([demand(tokens)]), min(limits, default=_USUAL_POSITIONS))


def measure_room(free_bytes: int, probe: Probe, positions: int | None, apart: bool = False, ways: Ways = AS_IT_IS) -> Room:
    """Measure the free memory, less a margin."""
    return Room(int(free_bytes * (1 - _KEPT_FREE)), probe, positions, apart, ways)
