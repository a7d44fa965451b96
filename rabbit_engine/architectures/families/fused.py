"""Operations that transformers' weight conversion lacks, for checkpoints of families that have no class of their own there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import ConversionOps, PretrainedConfig


class _FromOne(ConversionOps):
    """One stored tensor into the weights that the target patterns name, in their order."""

    @abstractmethod
    def parts(self, stored: torch.Tensor, config: PretrainedConfig) -> Sequence[torch.Tensor]:
        """What it is made into."""

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> Any:
        """Called by transformers' loading, with the model's `config` among the keywords."""
        del source_patterns
        (found,) = input_dict.values()
        stored = found[0] if isinstance(found, list) else found
        parts = self.parts(stored, kwargs["config"])
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Nothing is saved back."""
        raise NotImplementedError


class SplitQKV(_FromOne):
    """A fused projection, queries above keys above values, into the three: `[(heads + 2 * kv heads) * head_dim, ...]`."""

    def rows(self, config: PretrainedConfig) -> tuple[int, int, int]:
        """How many rows of the stored tensor each of the three is, in their order: they can be read where they lie."""
        heads, kv_heads, width = _heads(config)
        return heads * width, kv_heads * width, kv_heads * width

    def parts(self, stored: torch.Tensor, config: PretrainedConfig) -> Sequence[torch.Tensor]:
        """Queries, keys, values."""
        return torch.split(stored, list(self.rows(config)))


class SplitGroupedQKV(_FromOne):
    """A fused projection stored a key-value head at a time: its query heads, its key, its value, then the next one's.

    `[kv heads * (heads / kv heads + 2) * head_dim, ...]` into the three.
    """

    def parts(self, stored: torch.Tensor, config: PretrainedConfig) -> Sequence[torch.Tensor]:
        """Queries, keys, values."""
        heads, kv_heads, width = _heads(config)
        groups = heads // kv_heads
        grouped = stored.reshape(kv_heads, groups + 2, width, *stored.shape[1:])
        return [part.reshape(-1, *stored.shape[1:]) for part in torch.split(grouped, [groups, 1, 1], dim=1)]


class NormalizeRows(_FromOne):
    """Every row to length one, in the tensor's own dtype, as a head does that normalises its weight when it first runs."""

    def parts(self, stored: torch.Tensor, config: PretrainedConfig) -> Sequence[torch.Tensor]:
        """The normalised rows."""
        del config
        return [functional.normalize(stored)]


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the width of each."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, kv_heads, int(getattr(config, "head_dim", None) or config.hidden_size // heads)
