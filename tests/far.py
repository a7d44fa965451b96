"""A cache whose layers keep all but their newest tokens apart, in blocks; and the bound of attention over them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rabbit_engine.caches import with_far_blocks


@dataclass
class Blocks:
    """The first `tokens` of the states of a layer, `size` at a time."""

    keys: torch.Tensor
    values: torch.Tensor
    size: int
    uses: int = 0

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.uses += 1
        yield from zip(self.keys.split(self.size, dim=2), self.values.split(self.size, dim=2), strict=True)


class FarLayer(DynamicLayer):
    """Shows the newest tokens, `near` at most and those of the pass at least; the others are in blocks of `size`."""

    def __init__(self, near: int = 3, size: int = 4) -> None:
        super().__init__()
        self.near, self.size = near, size
        self.far: list[Blocks] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        far = keys.shape[2] - max(self.near, key_states.shape[2])
        if far <= 0:
            return keys, values
        self.far.append(Blocks(keys[:, :, :far], values[:, :, :far], self.size))
        return with_far_blocks(keys[:, :, far:], values[:, :, far:], self.far[-1])


def far_cache(config: Any, window: bool = True) -> DynamicCache:
    """The cache that `generate` would make for the config, with blocks for its layers that grow, or for those that slide too."""
    cache = DynamicCache(config=config)
    cache.layers = [
        FarLayer() if type(layer) is DynamicLayer or (not window and isinstance(layer, DynamicLayer)) else layer
        for layer in cache.layers
    ]
    return cache


def uses(cache: DynamicCache) -> int:
    """How often the blocks of any layer were gone through."""
    return sum(blocks.uses for layer in cache.layers for blocks in getattr(layer, "far", ()))


def stated_bound(query: torch.Tensor, values: torch.Tensor, largest: float, size: int) -> float:
    """The bound in the docstring of `block_attention`, but for the rounding of the result; `largest` is its S."""
    blocks = math.ceil(values.shape[2] / size)
    units = (query.shape[-1] + 2 * blocks + 6) * largest + size + 4 * blocks + 8
    return 2 * 2.0**-24 * units * float(values.double().abs().max())
