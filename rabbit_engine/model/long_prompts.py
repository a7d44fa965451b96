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
from itertools import pairwise
from typing import Any

import torch
from transformers import Cache, DynamicCache

from rabbit_engine.decoding.verification import KINDS, PER_TOKEN, mask_kinds
from rabbit_engine.model.runtime import Runtime, runtime_of
from rabbit_engine.planning.parts import layer_of
from rabbit_engine.streaming.part_masks import PartMasks
from rabbit_engine.streaming.parts import run_in_parts
from rabbit_engine.streaming.stages.parts import PartHops
from rabbit_engine.transformers_bridge.block_ends import ends_of
from rabbit_engine.transformers_bridge.caches import (
    PartCache,
    is_dynamic,
    is_made_for,
    is_recording,
    state_layers,
    tokens_in,
    windows_of,
)
from rabbit_engine.transformers_bridge.forwards import CACHE_NAMES, cache_of
from rabbit_engine.transformers_bridge.generation import Asked

_PART_ROWS: ContextVar[tuple[object, int | None] | None] = ContextVar("part_rows", default=None)

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
        if wanted is None or wanted[0] is not self or args:
            return forward(**keywords) if not args else forward(*args, **keywords)
        inputs = _without_begun(keywords)
        if self._shows_states or not _can_part(inputs, runtime_of(self)):
            return forward(**inputs)
        bounds = _bounds(inputs, wanted[1])
        return forward(**inputs) if bounds is None else _run_parts(forward, runtime_of(self), inputs, bounds)

    @contextmanager
    def computing_parts(self, rows: int | None) -> Iterator[None]:
        """A block in which prompts of more than `rows` tokens are computed in parts of as many; whole if that is None, but for
        the ends that watch their cache."""
        token = _PART_ROWS.set((self, rows))
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
    if is_padded(prompt, given, asked) and _has_states(runtime):
        return False  # their masks hide padding from states, which one for keys does not
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


def _has_states(runtime: Runtime) -> bool:
    return bool(state_layers(DynamicCache(config=runtime.architecture.config.get_text_config())))


def _is_any(kinds: object) -> bool:
    return isinstance(kinds, torch.Tensor) and bool(kinds.any())


def _is_plain(cache: object, runtime: Runtime) -> bool:
    """Whether it is one that `generate` makes by default: a class of the caller's may do more."""
    if not isinstance(cache, Cache) or not is_dynamic(cache):
        return False
    return is_made_for(cache, runtime.architecture.config.get_text_config()) and not is_recording(cache)


def _can_part(inputs: Mapping[str, Any], runtime: Runtime) -> bool:
    """Whether a forward is one over a prompt that may be computed in parts, and needs only the last logits."""
    ids, mask, cache = inputs.get("input_ids"), inputs.get("attention_mask"), cache_of(inputs)
    if not isinstance(ids, torch.Tensor) or inputs.get("inputs_embeds") is not None:
        return False
    if ids.shape[1] < 2 and ends_of(cache) is None:
        return False
    if inputs.get("logits_to_keep") != 1 or not _is_plain(cache, runtime):
        return False
    if "position_ids" not in inputs and windows_of(cache):
        return False
    if mask is None or state_layers(cache):
        return mask is None or bool(mask.all())
    return _is_left_padding(mask, len(ids)) and mask.shape[1] == (tokens_in(cache) or 0) + ids.shape[1]


def _without_begun(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of a prompt, without the tokens whose states are in a cache that does not tell how many it has."""
    cache, ids = cache_of(inputs), inputs.get("input_ids")
    ends = ends_of(cache)
    if ends is None or tokens_in(cache) is not None or not isinstance(ids, torch.Tensor) or ids.shape[1] <= ends.begun:
        return inputs
    found = {name: _cut(name, value, ends.begun, ids.shape[1]) for name, value in inputs.items()}
    return found | {name: None for name in ("attention_mask",) if name in inputs}


def _bounds(inputs: Mapping[str, Any], rows: int | None) -> list[tuple[int, int]] | None:
    """The first token of each part, and where it stops: after `rows` tokens, and where ends that watch the cache are. None for a
    forward in one piece, unless the tokens before it were computed in parts: it is one more then, with the same kernels."""
    length, ends = inputs["input_ids"].shape[1], ends_of(cache_of(inputs))
    past = _past(inputs)
    watched = [] if ends is None else [tokens - past for tokens in ends.tokens if past < tokens <= past + length]
    cuts = sorted({*range(0, length, rows or length), *(stop for stop in watched if stop < length), length})
    is_whole = len(cuts) == 2 and not watched and not (ends is not None and ends.begun)
    return None if is_whole else list(pairwise(cuts))


def _past(inputs: Mapping[str, Any]) -> int:
    """The tokens before those of a forward."""
    cache = cache_of(inputs)
    ends, tokens = ends_of(cache), tokens_in(cache)
    return tokens if tokens is not None else 0 if ends is None else ends.begun


def _run_parts(forward: Callable[..., Any], runtime: Runtime, inputs: Mapping[str, Any], bounds: list[tuple[int, int]]) -> Any:
    """The output of the last part, with the cache of all."""
    cache, past = cache_of(inputs), _past(inputs)
    masks = _masks(runtime, inputs, bounds)
    last: list[Any] = []

    def run(first: int, stop: int) -> None:
        found = {name: _cut(name, value, first, stop) for name, value in inputs.items()}
        found["attention_mask"] = masks.of(past + first, stop - first)
        part = PartCache(cache, past + first, past + stop, ends_of(cache))
        found |= {name: part for name in CACHE_NAMES if isinstance(inputs.get(name), Cache)}
        last[:] = [forward(**found)]

    def show(index: int) -> None:
        first, stop = bounds[index]
        masks.show(past + first, stop - first)

    works = [partial(run, *each) for each in bounds]
    hops = PartHops([(past + first, past + stop) for first, stop in bounds], masks) if runtime.in_stages else None
    run_in_parts(runtime.binding, works, partial(layer_of, layers=runtime.partition.layout.layers), show, hops)
    output = last[0]
    for name in CACHE_NAMES:
        if name in output:
            output[name] = cache
    return output


def _masks(runtime: Runtime, inputs: Mapping[str, Any], bounds: list[tuple[int, int]]) -> PartMasks:
    cache, mask = cache_of(inputs), inputs.get("attention_mask")
    types = getattr(runtime.architecture.config.get_text_config(), "layer_types", None)
    windows = windows_of(cache)
    without = {types[layer] for layer in state_layers(cache) if layer not in windows} if types else set()
    padding = None if mask is None or bool(mask.all()) else ~mask.bool()
    rows = max(stop - first for first, stop in bounds)
    tokens = _past(inputs) + bounds[-1][1]
    kinds = mask_kinds(windows, types) if windows else {}
    return PartMasks(kinds, rows, tokens, runtime.dtype, runtime.device, padding, without)


def _cut(name: str, value: Any, first: int, stop: int) -> Any:
    """A keyword of the whole prompt, for its tokens from `first` to `stop`."""
    return value[..., first:stop] if name in PER_TOKEN and isinstance(value, torch.Tensor) else value
