"""Checks whether a prompt fits in the free memory before `generate` computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rabbit_engine.model.runtime import Runtime
from rabbit_engine.planning.demand import Demand, refuse_beyond
from rabbit_engine.streaming import fiber_on
from rabbit_engine.transformers_bridge.caches import tokens_in

_USUAL_LENGTH = 20
"""The default number of tokens of prompt and answer, as in transformers."""


def refuse_what_cannot_fit(runtime: Runtime, prompt: object, given: Mapping[str, Any], config: object) -> None:
    """Raise PromptTooLongError if `generate` for `prompt` ([sequences, tokens], or embeddings) needs more than the free memory.

    `given` are its keywords, `config` the generation config for everything else. A session's requests were already checked.
    """
    if not isinstance(prompt, torch.Tensor) or prompt.dim() < 2 or fiber_on(runtime.binding) is not None:
        return
    demand = demand_of(prompt, given, config)
    refuse_beyond(runtime.partition.probe, demand, runtime.free_bytes, str(runtime.device))


def demand_of(prompt: torch.Tensor, given: Mapping[str, Any], config: object) -> Demand:
    """The demand of a `generate` call: every beam and every answer to the same prompt is a separate sequence."""

    def asked(name: str) -> Any:
        return given.get(name, getattr(config, name, None))

    tokens = prompt.shape[1]
    new = asked("max_new_tokens")
    answer = new if new is not None else (asked("max_length") or _USUAL_LENGTH) - tokens
    mask = given.get("attention_mask")
    return Demand(
        tokens - _computed_tokens(given),
        max(1, answer),
        sequences=len(prompt) * max(asked("num_beams") or 1, asked("num_return_sequences") or 1),
        padded=isinstance(mask, torch.Tensor) and not bool(mask.all()),
        chunk=asked("prefill_chunk_size"),
    )


def _computed_tokens(given: Mapping[str, Any]) -> int:
    """The number of prompt tokens that the cache already holds; 0 if it does not tell."""
    cache = given.get("past_key_values", given.get("cache"))
    return (tokens_in(cache) or 0) if hasattr(cache, "get_seq_length") else 0
