"""Checks whether a prompt fits in the free memory before `generate` computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from rabbit_engine.model.long_prompts import is_padded, may_part, why_whole
from rabbit_engine.model.runtime import Runtime
from rabbit_engine.model.tiered_caches import may_tier, ways_of
from rabbit_engine.planning.demand import Demand, fitted
from rabbit_engine.streaming import fiber_on
from rabbit_engine.transformers_bridge.caches import tokens_in
from rabbit_engine.transformers_bridge.generation import Asked

Reading = Literal["prompt", "text", "media"]
"""What comes first: the prompt that a decoder continues, an encoder's text, or an encoder's image or sound."""

_USUAL_ANSWER = 20
"""The default number of new tokens, as in transformers."""


def admitted(runtime: Runtime, prompt: object, given: Mapping[str, Any], asked: Asked) -> Demand:
    """How `generate` is to compute `prompt` ([sequences, tokens], or embeddings): in parts of `chunk` tokens in one pass (whole,
    or as transformers does it, if that is None), with `tiered` layers of its cache in tiers. Raises PromptTooLongError if it
    needs more than the free memory.

    `given` are its keywords, `asked` tells its settings. A session's requests were already checked.
    """
    if not isinstance(prompt, torch.Tensor) or prompt.dim() < 2:
        return Demand(0, 0)
    demand, parts = demand_of(prompt, given, asked, reading_of(runtime)), may_part(runtime, prompt, given, asked)
    if fiber_on(runtime.binding) is None:
        whole = why_whole(asked) if runtime.computes_parts and not parts else ""
        ways = ways_of(runtime, parts=parts, tiers=may_tier(given, asked))
        ways = replace(
            ways, pieces=ways.pieces and not asked("output_attentions")
        )  # attention over blocks has no weights to show
        demand = fitted(runtime.partition.probe, demand, runtime.free_bytes, str(runtime.device), ways, why_whole=whole)
    return demand if parts else replace(demand, chunk=None)


def prompt_of(inputs: object, given: Mapping[str, Any], main_input: str) -> Any:
    """What `generate` is to read: embeddings, the first argument, token ids, the class's own input, or an encoder's states."""
    found = (given.get("inputs_embeds"), inputs, given.get("input_ids"), given.get(main_input))
    first = next((one for one in found if one is not None), None)
    states = given.get("encoder_outputs")
    return states[0] if first is None and states is not None else first


def reading_of(runtime: Runtime) -> Reading:
    """What the class of the model reads, and where."""
    cls, config = runtime.architecture.cls, runtime.architecture.config
    return "prompt" if not config.is_encoder_decoder else "text" if cls.main_input_name == "input_ids" else "media"


def demand_of(prompt: torch.Tensor, given: Mapping[str, Any], asked: Asked, reading: Reading = "prompt") -> Demand:
    """The demand of a `generate` call: every beam and every answer to the same prompt is a separate sequence.

    An encoder's text is a prompt whose tokens `max_length` does not count; its image or sound has no tokens.
    """
    begun = given.get("decoder_input_ids")
    decoded = begun.shape[1] if isinstance(begun, torch.Tensor) and begun.dim() == 2 else 1
    counted = prompt.shape[1] if reading == "prompt" else decoded
    tokens = decoded if reading == "media" else prompt.shape[1]
    new, length = asked("max_new_tokens"), asked("max_length")
    answer = new if new is not None else _USUAL_ANSWER if length is None else length - counted
    return Demand(
        tokens - _computed_tokens(given),
        max(1, answer),
        sequences=len(prompt) * max(asked("num_beams") or 1, asked("num_return_sequences") or 1),
        padded=is_padded(prompt, given, asked),
        chunk=asked("prefill_chunk_size"),
    )


def _computed_tokens(given: Mapping[str, Any]) -> int:
    """The number of prompt tokens that the cache already holds; 0 if it does not tell."""
    cache = given.get("past_key_values", given.get("cache"))
    return (tokens_in(cache) or 0) if hasattr(cache, "get_seq_length") else 0
