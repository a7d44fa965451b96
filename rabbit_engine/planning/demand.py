"""What texts take on top of the weights, and whether that is free: asked before a prompt is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rabbit_engine.errors import PromptTooLongError
from rabbit_engine.planning.probe import Probe
from rabbit_engine.utils.heap import give_free_memory_back
from rabbit_engine.utils.sizes import format_bytes

_SAMPLING_BYTES = 40
"""A token of the vocabulary, while the next one is chosen: logits in float32, sorted, with their places, summed, masked."""

_MASK_BYTES = 4
"""A pair of positions of a padded prompt: the mask as booleans, and as the kernel takes it."""

KEPT_FREE_BYTES = 32 * 2**20
"""Bytes that a prompt leaves free for newly compiled kernels, small heap blocks and Python objects."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Tokens of a request: its prompt's, and as many as its answer may have; `sequences` are computed side by side.

    A `padded` batch takes a mask. Of the prompt `chunk` tokens are computed at a time, all where that is None, and one (the
    newest) where it `is_computed` already.
    """

    prompt: int
    answer: int
    sequences: int = 1
    padded: bool = False
    chunk: int | None = None
    is_computed: bool = False


def cache_bytes(probe: Probe, demand: Demand) -> int:
    """Bytes of the caches of all sequences at full length."""
    return demand.sequences * probe.cache_token_bytes * (demand.prompt + demand.answer)


def work_bytes(probe: Probe, demand: Demand) -> int:
    """What lives at once in a pass, without the caches: activations, masks, logits and what chooses from them."""
    tokens = 1 if demand.is_computed else min(demand.prompt, demand.chunk or demand.prompt)
    mask = _MASK_BYTES * tokens**2 if demand.padded else 0
    return demand.sequences * (probe.activation_bytes(tokens) + mask + _SAMPLING_BYTES * probe.vocabulary)


def need_bytes(probe: Probe, demand: Demand) -> int:
    """All that a request takes on top of the weights: its caches at their longest, and a pass over its prompt."""
    return cache_bytes(probe, demand) + work_bytes(probe, demand)


def most_prompt(fits: Callable[[int], bool], most: int) -> int:
    """The longest prompt of up to `most` tokens that fits; 0 if none does."""
    least, above = 0, most + 1
    while above - least > 1:
        middle = (least + above) // 2
        least, above = (middle, above) if fits(middle) else (least, middle)
    return least


def refuse_beyond(probe: Probe, demand: Demand, find_free_bytes: Callable[[], int], place: str) -> None:
    """Raise PromptTooLongError if `demand` needs more than the free memory of `place`."""
    need = need_bytes(probe, demand) + KEPT_FREE_BYTES
    free = find_free_bytes()
    if need > free:
        give_free_memory_back()
        free = find_free_bytes()
    if need <= free:
        return
    fits = most_prompt(lambda tokens: need_bytes(probe, replace(demand, prompt=tokens)) + KEPT_FREE_BYTES <= free, demand.prompt)
    side_by_side = f"{demand.sequences} sequences of " if demand.sequences > 1 else ""
    wanted = demand.sequences * (demand.prompt + demand.answer)
    raise PromptTooLongError(
        f"{side_by_side}{demand.prompt} tokens and {demand.answer} to come need {format_bytes(need)} on top of the weights, "
        f"{format_bytes(free)} are free on {place}, enough for a prompt of {fits} tokens: shorten it, ask for fewer new tokens, "
        f"or load the model with max_seq_len={wanted}, which leaves that much less to the weights"
    )
