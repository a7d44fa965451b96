"""The parts of a Llama that families with the same computation replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from rabbit_engine.transformers_bridge.forwards import cache_keyword

_CACHE = str(cache_keyword(LlamaAttention.forward))


class MaskedLlamaAttention(LlamaAttention):
    """Llama's attention with a mask from its subclass."""

    def mask(self, mask: torch.Tensor | None, states: torch.Tensor, seen: int, keys: int) -> torch.Tensor:
        """Scores to add, [1 or batch, heads, queries, keys]; `seen` of the keys come before the queries.

        `states` [batch, queries, hidden] gives the dtype and the device. `mask` is transformers' mask for sdpa (bool, True is
        visible) or eager (scores to add), or None for plain causal attention.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Llama's forward, whose layers pass everything by keyword."""
        queries = hidden_states.shape[1]
        seen, keys = 0, queries
        cache: Cache | None = kwargs.get(_CACHE)
        if cache is not None:
            seen = int(cache.get_seq_length(self.layer_idx))
            keys = int(cache.get_mask_sizes(queries, self.layer_idx)[0])
        mask = self.mask(attention_mask, hidden_states, seen, keys)
        result: tuple[torch.Tensor, torch.Tensor] = super().forward(hidden_states, position_embeddings, mask, **kwargs)
        return result


def replace_attention(model: LlamaModel, kind: type[MaskedLlamaAttention], rotary: nn.Module) -> None:
    """Make every layer use the attention `kind`, whose queries and keys `rotary` rotates: (states, position ids) -> cos, sin.

    cos and sin are [batch, queries, head_dim]. Call it in the constructor of `model`.
    """
    model.rotary_emb = rotary  # type: ignore[assignment]
    for index, layer in enumerate(model.layers):
        layer.self_attn = kind(model.config, index)
    model.post_init()
