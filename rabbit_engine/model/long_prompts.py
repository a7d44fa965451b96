"""A prompt whose activations do not fit is computed in parts, in one pass over the weights.

The parts are forwards of the model's own over consecutive tokens of the prompt, with one cache: they go through each layer one
after another, so a layer's weights are read once, and what is live inside it is that of one part. The keys that a token sees are
the same as in one forward; products and sums are over other shapes, so results differ from it by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers import Cache

from rabbit_engine.decoding.verification import KINDS, PER_TOKEN, mask_kinds
from rabbit_engine.model.part_masks import PartMasks
from rabbit_engine.model.runtime import Runtime, runtime_of
from rabbit_engine.planning.parts import layer_of
from rabbit_engine.streaming.parts import run_in_parts
from rabbit_engine.transformers_bridge.caches import PartCache, is_dynamic, is_made_for, is_recording, tokens_in, windows_of
from rabbit_engine.transformers_bridge.forwards import CACHE_NAMES, cache_of
from rabbit_engine.transformers_bridge.generation import Asked

_PART_ROWS: ContextVar[tuple[object, int] | None] = ContextVar("part_rows", default=None)

_CACHES = (None, "dynamic")
"""Kinds of caches that hold what parts need: the default."""

_BEFORE_THE_LOOP = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""Keywords of `generate` with which its first forward is not over the prompt alone."""

_RETURNED = ("output_attentions", "output_hidden_states")
"""Settings that return something of each token besides ids and scores."""


class LongPromptMixin:
    """What `generate` calls: the model. In a block of `computing_parts` a prompt goes through it in parts."""

    _shows_states: bool = False
    """Whether a draft is shown the states of each pass: those of a prompt are in one forward then."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """The model's own, in parts if the prompt is longer than one."""
        wanted = _PART_ROWS.get()
        forward = super().__call__  # type: ignore[misc] # of the class that is mixed in
        is_mine = wanted is not None and wanted[0] is self and not self._shows_states
        if wanted is None or not is_mine or args or not _can_part(keywords, runtime_of(self), wanted[1]):
            return forward(**keywords) if not args else forward(*args, **keywords)
        return _run_parts(forward, runtime_of(self), keywords, wanted[1])

    @contextmanager
    def computing_parts(self, rows: int | None) -> Iterator[None]:
        """A block in which prompts of more than `rows` tokens are computed in parts of as many; whole if that is None."""
        token = _PART_ROWS.set(None if rows is None else (self, rows))
        try:
            yield
        finally:
            _PART_ROWS.reset(token)


def why_whole(asked: Asked) -> str:
    """The setting of `generate` with which no prompt is computed in parts; empty if there is none."""
    if asked("use_cache") is False:
        return "use_cache=False"
    if asked("cache_implementation") not in _CACHES:
        return f"cache_implementation={asked('cache_implementation')!r}"
    return next((f"{name}=..." for name in (*_BEFORE_THE_LOOP, *_RETURNED) if asked(name)), "")


def may_part(runtime: Runtime, prompt: object, given: Mapping[str, Any], asked: Asked) -> bool:
    """Whether `generate` for `prompt`, with the keywords `given` and the settings `asked`, can compute it in parts: token ids,
    with padding on the left alone, a cache that keeps all, and nothing returned of each token but ids and scores."""
    if not runtime.computes_parts or not isinstance(prompt, torch.Tensor) or prompt.dim() != 2 or prompt.is_floating_point():
        return False
    if any(isinstance(value, torch.Tensor) and name not in PER_TOKEN for name, value in given.items()):
        return False
    cache, mask = cache_of(given), given.get("attention_mask")
    if mask is None and is_padded(prompt, given, asked):
        mask = prompt != asked("pad_token_id")
    if mask is not None and not _is_left_padding(mask, len(prompt)):
        return False
    if any(_is_any(given.get(name)) for name in KINDS):  # tokens of an image may see each other
        return False
    if cache is not None and not _is_plain(cache, runtime):
        return False
    chunk = asked("prefill_chunk_size")
    if chunk is not None and not (isinstance(chunk, int) and chunk > 0):
        return False  # transformers says what is wrong with it
    return not why_whole(asked)


def is_padded(prompt: torch.Tensor, given: Mapping[str, Any], asked: Asked) -> bool:
    """Whether `generate` needs a mask for `prompt`: that of the keywords `given`, or the one that transformers makes without."""
    mask = given.get("attention_mask")
    if mask is not None:
        return not (isinstance(mask, torch.Tensor) and bool(mask.all()))
    return prompt.dim() == 2 and _has_padding(prompt, asked("pad_token_id"), asked("eos_token_id"))


def _is_left_padding(mask: object, sequences: int) -> bool:
    """Whether a mask [sequences, tokens] shows the last token of every sequence: the states of others are never used."""
    is_mask = isinstance(mask, torch.Tensor) and mask.dim() == 2 and len(mask) == sequences
    return isinstance(mask, torch.Tensor) and is_mask and bool(mask[:, -1].all())


def _has_padding(prompt: torch.Tensor, pad: object, ends: object) -> bool:
    """Whether transformers, without a mask, takes tokens of the prompt for padding."""
    own = pad if isinstance(pad, int) else None
    return own is not None and own not in (ends if isinstance(ends, list) else [ends]) and bool((prompt == own).any())


def _is_any(kinds: object) -> bool:
    return isinstance(kinds, torch.Tensor) and bool(kinds.any())


def _is_plain(cache: object, runtime: Runtime) -> bool:
    """Whether it is one that `generate` makes by default: a class of the caller's may do more."""
    if not isinstance(cache, Cache) or not is_dynamic(cache):
        return False
    return is_made_for(cache, runtime.architecture.config.get_text_config()) and not is_recording(cache)


def _can_part(inputs: Mapping[str, Any], runtime: Runtime, rows: int) -> bool:
    """Whether a forward is one over a prompt of more than `rows` tokens that needs only the last logits."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.shape[1] <= rows or inputs.get("inputs_embeds") is not None:
        return False
    if inputs.get("logits_to_keep") != 1 or "position_ids" not in inputs:
        return False
    mask, cache = inputs.get("attention_mask"), cache_of(inputs)
    if mask is not None and not (_is_left_padding(mask, len(ids)) and mask.shape[1] == (tokens_in(cache) or 0) + ids.shape[1]):
        return False
    return _is_plain(cache, runtime)


def _run_parts(forward: Callable[..., Any], runtime: Runtime, inputs: Mapping[str, Any], rows: int) -> Any:
    """The output of the last part, with the cache of all."""
    cache, length, mask = cache_of(inputs), inputs["input_ids"].shape[1], inputs.get("attention_mask")
    past = tokens_in(cache) or 0
    config = runtime.architecture.config.get_text_config()
    kinds = mask_kinds(windows_of(cache), getattr(config, "layer_types", None))
    padding = None if mask is None or bool(mask.all()) else ~mask.bool()
    masks = PartMasks(kinds, rows, past + length, runtime.dtype, runtime.device, padding)
    bounds = [(first, min(first + rows, length)) for first in range(0, length, rows)]
    last: list[Any] = []

    def run(first: int, stop: int) -> None:
        found = {name: _cut(name, value, first, stop) for name, value in inputs.items()}
        found["attention_mask"] = masks.of(past + first, stop - first)
        found |= {name: PartCache(cache, past + first) for name in CACHE_NAMES if isinstance(inputs.get(name), Cache)}
        last[:] = [forward(**found)]

    def show(index: int) -> None:
        first, stop = bounds[index]
        masks.show(past + first, stop - first)

    works = [partial(run, *each) for each in bounds]
    run_in_parts(runtime.binding, works, partial(layer_of, layers=runtime.partition.layout.layers), show)
    output = last[0]
    for name in CACHE_NAMES:
        if name in output:
            output[name] = cache
    return output


def _cut(name: str, value: Any, first: int, stop: int) -> Any:
    """A keyword of the whole prompt, for its tokens from `first` to `stop`."""
    return value[..., first:stop] if name in PER_TOKEN and isinstance(value, torch.Tensor) else value
