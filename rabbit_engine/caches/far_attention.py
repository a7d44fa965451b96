"""The attention function that transformers' models run over a cache in blocks; any other cache they attend to as ever."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn

from rabbit_engine.caches.block_attention import attend_by_blocks
from rabbit_engine.caches.far_states import FarStates
from rabbit_engine.errors import FarStatesError

AttentionFunction = Callable[..., Any]

_WITH_PADDING_MASKS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Implementations whose mask [batch, tokens] tells what is padding; they know windows, and what is causal. The others have a mask
[batch, heads or 1, rows, tokens] of all that a row sees."""

KNOWN_ATTENTION = ("eager", "sdpa", *_WITH_PADDING_MASKS)
"""Implementations of transformers that can attend over blocks."""

_HARMLESS = {"position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits", "return_dict"}
"""Arguments that pass through attention and do not change it."""


def attention_over_blocks(name: str, native: AttentionFunction) -> AttentionFunction:
    """An attention function of transformers' interface: `native`, unless the keys are FarStates.

    `name` is the implementation that the model runs: what its masks mean depends on it. For FarStates the result is that of
    `attend_by_blocks`, [batch, rows, heads, value_width] and no weights. Raises FarStatesError for what it cannot compute, and
    for a function that is not transformers' own, as remote code's and a caller's may mean anything. A function that attends over
    blocks already is returned as it is.
    """
    if getattr(native, "attends_over_blocks", False):
        return native

    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(key, FarStates) or isinstance(value, FarStates):
            module_name = str(getattr(native, "__module__", ""))
            if name not in KNOWN_ATTENTION or not module_name.startswith("transformers."):
                raise FarStatesError(f"attention over blocks does not know what {name} computes by {native!r}")
            if name == "sdpa":
                kwargs = _as_sdpa_takes_them(native, module, query, kwargs)
            return _far(name, module, query, key, value, *args, **kwargs), None
        result: tuple[torch.Tensor, torch.Tensor | None] = native(module, query, key, value, *args, **kwargs)
        return result

    attention.attends_over_blocks = True  # type: ignore[attr-defined]
    attention.__wrapped__ = native  # type: ignore[attr-defined]
    return attention


def _as_sdpa_takes_them(
    native: AttentionFunction, module: nn.Module, query: torch.Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Without a softcap and sinks, which transformers' sdpa ignores, as here, or refuses in later releases: it is asked."""
    ignored = {name: kwargs[name] for name in ("softcap", "s_aux") if kwargs.get(name) is not None}
    if ignored:
        groups = getattr(module, "num_key_value_groups", 1)
        row = query[:, ::groups, :1]
        native(module, query[:, :, :1], row, row, None, **ignored)
    return {name: given for name, given in kwargs.items() if name not in ignored}


def _far(
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> torch.Tensor:
    if not (isinstance(key, FarStates) and isinstance(value, FarStates) and key.far is value.far):
        raise FarStatesError("the keys and the values of a cache in blocks reached attention apart")
    unknown = sorted(key for key, given in others.items() if key not in _HARMLESS and given is not None and given is not False)
    if unknown or dropout:
        raise FarStatesError(f"attention over blocks does not know {', '.join(unknown) or 'dropout'}")
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None].bool()
    elif attention_mask is not None or name == "eager":
        causal, sliding_window = False, None
    result = attend_by_blocks(
        query,
        chain(key.far.blocks(), [(key.near, value.near)]),
        key.tokens,
        mask=attention_mask,
        causal=causal,
        window=sliding_window,
        scaling=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return result.transpose(1, 2).contiguous()
