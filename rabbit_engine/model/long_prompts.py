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
from transformers import Cache, DynamicCache

from rabbit_engine.decoding.verification import KINDS, PER_TOKEN, additive, mask_kinds
from rabbit_engine.model.runtime import Runtime, runtime_of
from rabbit_engine.planning.parts import layer_of
from rabbit_engine.streaming.parts import run_in_parts
from rabbit_engine.transformers_bridge.caches import PartCache, is_made_for, is_recording, tokens_in, windows_of
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
    """Whether `generate` for `prompt`, with the keywords `given` and the settings `asked`, can compute it in parts: token ids
    without padding, a cache that keeps all, and nothing returned of each token but ids and scores."""
    if not runtime.computes_parts or not isinstance(prompt, torch.Tensor) or prompt.dim() != 2 or prompt.is_floating_point():
        return False
    if any(isinstance(value, torch.Tensor) and name not in PER_TOKEN for name, value in given.items()):
        return False
    cache = cache_of(given)
    if is_padded(prompt, given, asked):
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
        return _hides(mask)
    return prompt.dim() == 2 and _has_padding(prompt, asked("pad_token_id"), asked("eos_token_id"))


def _hides(mask: object) -> bool:
    """Whether a mask of a prompt says anything: one of ones does not."""
    return mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool(mask.all()))


def _has_padding(prompt: torch.Tensor, pad: object, ends: object) -> bool:
    """Whether transformers, without a mask, takes tokens of the prompt for padding."""
    own = pad if isinstance(pad, int) else None
    return own is not None and own not in (ends if isinstance(ends, list) else [ends]) and bool((prompt == own).any())


def _is_any(kinds: object) -> bool:
    return isinstance(kinds, torch.Tensor) and bool(kinds.any())


def _is_plain(cache: object, runtime: Runtime) -> bool:
    """Whether it is one that `generate` makes by default: a class of the caller's may do more."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    return is_made_for(cache, runtime.architecture.config.get_text_config()) and not is_recording(cache)


def _can_part(inputs: Mapping[str, Any], runtime: Runtime, rows: int) -> bool:
    """Whether a forward is one over a prompt of more than `rows` tokens that needs only the last logits."""
    ids = inputs.get("input_ids")
    is_long = isinstance(ids, torch.Tensor) and ids.shape[1] > rows and inputs.get("inputs_embeds") is None
    if not is_long or inputs.get("logits_to_keep") != 1 or "position_ids" not in inputs:
        return False
    return _is_plain(cache_of(inputs), runtime) and not _hides(inputs.get("attention_mask"))


def _run_parts(forward: Callable[..., Any], runtime: Runtime, inputs: Mapping[str, Any], rows: int) -> Any:
    """The output of the last part, with the cache of all."""
    cache, length = cache_of(inputs), inputs["input_ids"].shape[1]
    past = tokens_in(cache) or 0
    config = runtime.architecture.config.get_text_config()
    kinds = mask_kinds(windows_of(cache), getattr(config, "layer_types", None))
    masks = {kind: _part_mask(window, rows, past + length, runtime) for kind, window in kinds.items()}
    last: list[Any] = []

    def run(first: int, stop: int) -> None:
        found = {name: _cut(name, value, first, stop) for name, value in inputs.items()}
        cut = {kind: _mask_of(masks[kind], window, past + first, stop - first) for kind, window in kinds.items()}
        found["attention_mask"] = cut if len(cut) > 1 else next(iter(cut.values()))
        found |= {name: PartCache(cache, past + first) for name in CACHE_NAMES if isinstance(inputs.get(name), Cache)}
        last[:] = [forward(**found)]

    works = [partial(run, first, min(first + rows, length)) for first in range(0, length, rows)]
    layers = runtime.partition.layout.layers
    run_in_parts(runtime.binding, works, partial(layer_of, layers=layers))
    output = last[0]
    for name in CACHE_NAMES:
        if name in output:
            output[name] = cache
    return output


def _cut(name: str, value: Any, first: int, stop: int) -> Any:
    """A keyword of the whole prompt, for its tokens from `first` to `stop`."""
    return value[..., first:stop] if name in PER_TOKEN and isinstance(value, torch.Tensor) else value


def _part_mask(window: int | None, rows: int, tokens: int, runtime: Runtime) -> torch.Tensor:
    """[1, 1, rows, keys]: what the last `rows` of `tokens` tokens see of the keys that a layer shows them. Those of an earlier
    or shorter part are its last rows and columns."""
    shown = tokens if window is None else min(tokens, window - 1 + rows)
    behind = torch.arange(rows)[:, None] + (shown - rows) - torch.arange(shown)[None, :]
    visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return additive(visible, runtime.dtype).to(runtime.device)


def _mask_of(mask: torch.Tensor, window: int | None, past: int, rows: int) -> torch.Tensor:
    """The part of a `_part_mask` for `rows` tokens after `past`."""
    shown = rows + (past if window is None else min(past, window - 1))
    return mask[..., mask.shape[-2] - rows :, mask.shape[-1] - shown :]
