"""The parts of a Llama that a family of the same computation puts others in place of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from rabbit_engine.transformers_bridge.forwards import cache_keyword

_CACHE = str(cache_keyword(LlamaAttention.forward))


class MaskedLlamaAttention(LlamaAttention):
    """Llama's attention with a mask that the subclass makes."""

    def mask(self, mask: torch.Tensor | None, states: torch.Tensor, seen: int, keys: int) -> torch.Tensor:
        """Scores to add, [1 or batch, heads, queries, keys], where `seen` of the keys came before the queries.

        `states` [batch, queries, hidden] has the dtype and the device. `mask` is what transformers made for sdpa (bool, True
        may be seen) or eager (scores to add), or None for plain causal attention.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Llama's, whose layers hand everything over by keyword."""
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
    """Let every layer attend by `kind`, whose queries and keys turn by `rotary`: (states, position ids) -> cos, sin.

    cos and sin are [batch, queries, head_dim]. `model` is one that its class is still constructing.
    """
    model.rotary_emb = rotary  # type: ignore[assignment]
    for index, layer in enumerate(model.layers):
        layer.self_attn = kind(model.config, index)
    model.post_init()
