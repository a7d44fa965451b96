"""A Llama whose attention encodes positions with ALiBi: a penalty on the score that grows with distance, with a slope per head.

Source: Press, Smith, Lewis, "Train Short, Test Long", section 3.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from rabbit_engine.errors import UnsupportedOperationError
from rabbit_engine.transformers_bridge.attention import without_flash_attention
from rabbit_engine.transformers_bridge.llama import MaskedLlamaAttention, replace_attention


class AlibiLlamaConfig(LlamaConfig):
    """LlamaConfig; its rotary parameters are not used."""

    model_type = "alibi_llama"


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 i / n) for i from 1 to n; between powers of two, those of the lower power and every second one of the higher."""
    lower = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / lower) for i in range(1, lower + 1)]
    return slopes + [2 ** (-4 * i / lower) for i in range(1, 2 * (heads - lower) + 1, 2)]


@functools.lru_cache(maxsize=16)
def _slopes_on(heads: int, device: torch.device) -> torch.Tensor:
    """fp32 [heads, 1, 1]."""
    return torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=device)[:, None, None]


def alibi_mask(
    mask: torch.Tensor | None, heads: int, seen: int, queries: int, keys: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Scores to add, [1 or batch, heads, queries, keys]; `seen` is the number of keys before the queries.

    `mask` is transformers' mask for sdpa (bool, True is visible) or eager (scores to add), or None for plain causal
    attention.
    """
    query_at = torch.arange(seen, seen + queries, device=device)[:, None]
    key_at = torch.arange(keys, device=device)[None, :]
    bias = (_slopes_on(heads, device) * (key_at - query_at)).to(dtype)[None]
    lowest = torch.finfo(dtype).min
    if mask is not None and mask.dtype != torch.bool:
        return (bias + mask).clamp(min=lowest)
    return bias.masked_fill(~(key_at <= query_at if mask is None else mask), lowest)


class AlibiAttention(MaskedLlamaAttention):
    """Llama's attention with the ALiBi scores in its mask."""

    def mask(self, mask: torch.Tensor | None, states: torch.Tensor, seen: int, keys: int) -> torch.Tensor:
        """The mask of `alibi_mask`."""
        heads = self.config.num_attention_heads
        return alibi_mask(mask, heads, seen, states.shape[1], keys, states.dtype, states.device)


class NoRotation(nn.Module):
    """A rotary embedding by the angle zero: queries and keys stay bit-identical."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [batch, queries, head_dim], of `x`'s dtype."""
        ones = x.new_ones(*position_ids.shape, self.head_dim)
        return ones, torch.zeros_like(ones)


@without_flash_attention
class AlibiLlamaModel(LlamaModel):
    """LlamaModel with ALiBi attention and without rotation."""

    config_class = AlibiLlamaConfig

    def __init__(self, config: AlibiLlamaConfig) -> None:
        super().__init__(config)
        replace_attention(self, AlibiAttention, NoRotation(int(config.head_dim or 0)))


@without_flash_attention
class AlibiLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM over AlibiLlamaModel. Continuous batching is refused: packed prompts lose their distances."""

    config_class = AlibiLlamaConfig

    def __init__(self, config: AlibiLlamaConfig) -> None:
        super().__init__(config)
        self.model = AlibiLlamaModel(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def init_continuous_batching(self, *_: object, **__: object) -> Any:
        """Raises UnsupportedOperationError."""
        raise UnsupportedOperationError(
            "continuous batching packs prompts one after another, which loses the distances that ALiBi needs: "
            "use generate() on a padded batch"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching
