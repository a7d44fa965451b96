"""Attention over keys and values that come in blocks, one in memory at a time: softmax(q k^T scaling + mask) v.

The softmax is online (Milakov and Gimelshein, 2018): each block's sum is rescaled to the largest score so far, as FlashAttention
(Dao et al., 2022) does inside a kernel. Heads that share keys are rows of one product, so that keys are not repeated.

Rounding. Scores, weights and sums are float32 for every dtype of the states (float64 for float64). Let u = 2^-24; S the largest
sum of |q| |k| scaling over a row and a key, plus the softcap and the largest |mask| added to a score that counts; B the number of
blocks, n the tokens of the longest. Against exact arithmetic on the same states, to first order in u, each element is within

    2 u ((width + 2 B + 6) S + n + 4 B + 8) max|v|    and half a unit in the last place of the result's dtype.

torch's `scaled_dot_product_attention` rounds the weights to the dtype too: against it in the same dtype, the difference is within
twice that plus 2 eps(dtype) max|v|. This needs float32 products at torch's default precision, not TF32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Block = tuple[torch.Tensor, torch.Tensor]
"""Keys [batch, kv_heads, n, width] and values [batch, kv_heads, n, value_width] of n tokens of a text."""


def attend_by_blocks(
    query: torch.Tensor,
    blocks: Iterable[Block],
    tokens: int,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [batch, heads, rows, width], blocks of `tokens` in all, first to last -> [batch, heads, rows, value_width] as query.

    `causal`: the rows are the last of the tokens, and see none after themselves; `window`: only the last `window` up to
    themselves. `mask` [batch or 1, heads or 1, rows or 1, tokens] holds in addition: true where a row sees a key, or numbers
    added to the scores. `softcap` bounds the scores before that. `sinks` [heads] are scores that count in the sum and have no
    value. A row that sees nothing is zero. Each block costs about ten calls of torch: larger ones are faster.
    Raises ValueError for blocks or a mask of another number of tokens.
    """
    if mask is not None and mask.shape[-1] != tokens:
        raise ValueError(f"the mask is for {mask.shape[-1]} tokens, the keys are of {tokens}")
    with _no_autocast(query.device.type):
        softmax = _OnlineSoftmax(query, scaling, softcap, sinks)
        start, rows = 0, query.shape[2]
        first_seen = tokens - rows - window + 1 if window is not None else 0
        for keys, values in blocks:
            end = start + keys.shape[2]
            if end > first_seen:
                seen = _seen(start, end, tokens, rows, causal, window, query.device)
                softmax.add(keys, values, None if mask is None else mask[..., start:end], seen)
            start = end
        if start != tokens:
            raise ValueError(f"the blocks hold {start} tokens of {tokens}")
        return softmax.result()


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Products stay in float32. Not every device type has autocast."""
    is_on = torch.is_autocast_enabled(device_type) if torch.amp.is_autocast_available(device_type) else False
    return torch.autocast(device_type, enabled=False) if is_on else nullcontext()


def _seen(
    start: int, end: int, tokens: int, rows: int, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """bool [rows, end - start]: which of the keys from `start` to `end` each row sees; None: all."""
    ahead = causal and end > tokens - rows + 1
    behind = window is not None and start < tokens - window
    if not ahead and not behind:
        return None
    row = torch.arange(tokens - rows, tokens, device=device)[:, None]
    key = torch.arange(start, end, device=device)
    seen = key <= row if ahead else torch.ones(rows, end - start, dtype=torch.bool, device=device)
    return seen & (key > row - window) if window is not None and behind else seen


class _OnlineSoftmax:
    """The weighted sum of the values so far. All of it is [batch * kv_heads, group * rows, ...] in float32."""

    def __init__(self, query: torch.Tensor, scaling: float | None, softcap: float | None, sinks: torch.Tensor | None) -> None:
        self._like = query
        self._dtype = torch.promote_types(query.dtype, torch.float32)
        self._scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        self._softcap, self._sinks = softcap, sinks
        self._started = False

    def _start(self, kv_heads: int, value_width: int) -> None:
        batch, heads, rows, width = self._like.shape
        if heads % kv_heads:
            raise ValueError(f"{heads} heads cannot share the keys of {kv_heads}")
        self._heads = (batch, kv_heads, heads // kv_heads, rows)
        self._query = (self._like.to(self._dtype) * self._scaling).reshape(batch * kv_heads, -1, width)
        self._largest = self._query.new_full((*self._query.shape[:2], 1), -math.inf)
        self._total = torch.zeros_like(self._largest)
        self._sum = self._query.new_zeros((*self._query.shape[:2], value_width))
        if self._sinks is not None:
            self._largest.view(self._heads).copy_(self._sinks.reshape(1, kv_heads, -1, 1))
            self._total.fill_(1.0)
        self._started = True

    def add(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, seen: torch.Tensor | None) -> None:
        """One more block, under its part of the mask and what the rows see of it."""
        if not self._started:
            self._start(keys.shape[1], values.shape[-1])
        scores = self._scores(keys, mask, seen)
        largest = torch.maximum(self._largest, scores.amax(-1, keepdim=True))
        shift = largest
        if mask is not None or seen is not None:  # a row may have seen nothing yet: exp(-inf - 0) is 0, exp(-inf - -inf) is not
            shift = largest.masked_fill(largest == -math.inf, 0.0)
        weights = scores.sub_(shift).exp_()
        kept = self._largest.sub_(shift).exp_()
        self._total.mul_(kept).add_(weights.sum(-1, keepdim=True))
        self._sum.mul_(kept).baddbmm_(weights, values.flatten(0, 1).to(self._dtype))
        self._largest = largest

    def _scores(self, keys: torch.Tensor, mask: torch.Tensor | None, seen: torch.Tensor | None) -> torch.Tensor:
        """[batch * kv_heads, group * rows, n]; -inf where a row does not see a key."""
        scores = torch.bmm(self._query, keys.flatten(0, 1).to(self._dtype).mT)
        if self._softcap is not None:
            scores.div_(self._softcap).tanh_().mul_(self._softcap)
        by_head = scores.view(*self._heads, -1)
        if mask is not None:
            mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, self._heads[1:3])
            by_head.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else by_head.add_(mask)
        if seen is not None:
            by_head.masked_fill_(~seen, -math.inf)
        return scores

    def result(self) -> torch.Tensor:
        """[batch, heads, rows, value_width] in the query's dtype."""
        if not self._started:
            raise ValueError("no block holds a token that any row could see")
        result = self._sum / self._total.masked_fill(self._total == 0, 1.0)
        return result.view(*self._like.shape[:3], -1).to(self._like.dtype)
