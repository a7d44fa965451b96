"""Attention of several query heads with the same keys and values, without a copy of those for each head.

transformers repeats keys and values for each query head if there is a mask. On a CPU, the heads that share them go to the same
kernel as texts of a batch instead, with views of the keys: each head computes the same, bit for bit.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rabbit_engine.transformers_bridge.attention import AttentionFunction

_OF_ANY_HEADS = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs")
_OF_HEADS = [name for name in inspect.signature(sdpa_attention_forward).parameters if name not in _OF_ANY_HEADS]
"""Parameters that may have values for each head, such as biases."""


def with_shared_keys(name: str, native: AttentionFunction) -> AttentionFunction:
    """A `Wrapper`: transformers' sdpa attention over one text copies no keys or values that several heads share. Other states
    than tensors are for `native`, which may wrap it."""
    del name
    if inspect.unwrap(native) is not sdpa_attention_forward:
        return native

    @functools.wraps(native)
    def attention(*args: Any, **keywords: Any) -> Any:
        return _attention(native, *args, **keywords)

    return attention


def _attention(
    native: AttentionFunction,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **keywords: Any,
) -> Any:
    """`sdpa_attention_forward`: [1, heads, tokens, width] -> [1, tokens, heads, value width]."""
    if type(key) is not torch.Tensor:
        return native(module, query, key, value, attention_mask, **keywords)
    heads, groups = key.shape[1], getattr(module, "num_key_value_groups", 1)
    is_shared = groups > 1 and query.shape[1] == heads * groups and _takes_views(query, attention_mask)
    if not is_shared or any(keywords.get(name) is not None for name in _OF_HEADS):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
    queries = query[0].unflatten(0, (heads, groups))
    keys, values = (states[0, :, None].expand(-1, groups, -1, -1) for states in (key, value))
    plain: Any = SimpleNamespace(num_key_value_groups=1, is_causal=getattr(module, "is_causal", True))
    found, weights = sdpa_attention_forward(plain, queries, keys, values, attention_mask, **keywords)
    return found.transpose(0, 1).reshape(1, query.shape[2], heads * groups, -1), weights


def _takes_views(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether transformers would copy keys, which it does not for one token, and the mask is the same for all heads."""
    if mask is None or query.device.type != "cpu" or len(query) != 1 or query.shape[2] == 1:
        return False
    return mask.dim() == 4 and mask.shape[:2] == (1, 1)
