"""Operations missing from transformers' weight conversion, for families without a class in transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import ConversionOps, PretrainedConfig


class _FromOne(ConversionOps):
    """Converts one stored tensor to the weights of the target patterns, in their order."""

    @abstractmethod
    def parts(self, stored: torch.Tensor, config: PretrainedConfig) -> Sequence[torch.Tensor]:
        """The converted tensors."""

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> Any:
        """Called by transformers' loading, which passes the model's `config` as a keyword."""
        del source_patterns
        (found,) = input_dict.values()
        stored = found[0] if isinstance(found, list) else found
        parts = self.parts(stored, kwargs["config"])
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Not supported: nothing is saved back."""
        raise NotImplementedError


class SplitQKV(_FromOne):
    """Splits a fused projection `[(heads + 2 * kv heads) * head_dim, ...]` into queries, keys and values."""

    def rows(self, config: PretrainedConfig) -> tuple[int, int, int]:
        """The number of rows of queries, keys and values: each can be read in place."""
        heads, kv_heads, width = _heads(config)
        return heads * width, kv_heads * width, kv_heads * width

    def parts(self, stored: torch.Tensor, config: PretrainedConfig) -> Sequence[torch.Tensor]:
        """Queries, keys, values."""
        return torch.split(stored, list(self.rows(config)))


class SplitGroupedQKV(_FromOne):
    """Splits a fused projection grouped by key-value head: its query heads, its key, its value, then the next group.

    `[kv heads * (heads / kv heads + 2) * head_dim, ...]` into queries, keys and values.
    """

    def parts(self, stored: torch.Tensor, config: PretrainedConfig) -> Sequence[torch.Tensor]:
        """Queries, keys, values."""
        heads, kv_heads, width = _heads(config)
        groups = heads // kv_heads
        grouped = stored.reshape(kv_heads, groups + 2, width, *stored.shape[1:])
        return [part.reshape(-1, *stored.shape[1:]) for part in torch.split(grouped, [groups, 1, 1], dim=1)]


class NormalizeRows(_FromOne):
    """Scales every row to length one in the tensor's own dtype, for heads that normalise their weight on the first run."""

    def parts(self, stored: torch.Tensor, config: PretrainedConfig) -> Sequence[torch.Tensor]:
        """The normalised rows."""
        del config
        return [functional.normalize(stored)]


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the width of each."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, kv_heads, int(getattr(config, "head_dim", None) or config.hidden_size // heads)
