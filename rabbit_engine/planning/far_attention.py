"""Whether a class attends to keys and values that are not in memory, by trying it on the meta device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from rabbit_engine.caches import FarStates, attention_over_blocks, with_far_blocks
from rabbit_engine.errors import first_line
from rabbit_engine.transformers_bridge.attention import wrapped_attention
from rabbit_engine.transformers_bridge.forwards import cache_of
from rabbit_engine.transformers_bridge.inputs import next_token
from rabbit_engine.transformers_bridge.tiered import growing_indices
from rabbit_engine.transformers_bridge.tiered_layers import TieredLayer

logger = logging.getLogger(__name__)


class _FarStates:
    """The states of a layer, all of them far but for those of the pass."""

    is_empty = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._blocks, self.tokens = (keys, values), keys.shape[2]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[FarStates, FarStates]:
        return with_far_blocks(keys, values, self)

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield self._blocks


def far_heads(model: PreTrainedModel, output: Any) -> int:
    """The most query heads of the layers that grow, of a model that gave `output` on the meta device; 0 if one of them fails
    without all keys and values. The cache in `output` is not used any more."""
    cache, inputs = cache_of(output), next_token(model, output)
    layers: list[Any] = getattr(cache, "layers", [])
    growing = growing_indices(layers)
    if any(layers[index].keys is None for index in growing):  # of images, which were not in the pass
        return 0
    for index in growing:
        states: Any = _FarStates(layers[index].keys, layers[index].values)
        layers[index] = TieredLayer(states)
    if not growing or inputs is None:
        return 0
    heads: list[int] = []
    try:
        with wrapped_attention(_noting(heads)):
            model(**inputs)
    except Exception as error:  # noqa: BLE001 - any class's code may fail with states that are not there, not only by FarStatesError
        logger.info("%s does not attend to keys and values outside memory: %s", type(model).__name__, first_line(error))
        return 0
    return max(heads) if len(heads) >= len(growing) else 0


def _noting(heads: list[int]) -> Callable[[str, Callable[..., Any]], Callable[..., Any]]:
    """Attention over blocks, which adds the heads of its queries to `heads`."""

    def wrap(name: str, native: Callable[..., Any]) -> Callable[..., Any]:
        function = attention_over_blocks(name, native)

        def attention(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(key, FarStates):
                heads.append(query.shape[1])
            return function(module, query, key, *args, **kwargs)

        return attention

    return wrap
