"""A dynamic cache whose growing layers keep their keys and values elsewhere, and have them whole only while they run."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

Pair = tuple[torch.Tensor, torch.Tensor]


class GrowingStates(Protocol):
    """Keys [rows, heads, tokens, width] and values of a layer, wherever they are."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever added."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        ...

    @property
    def rows(self) -> int:
        """How many texts are computed together."""
        ...

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """Add tokens; returns all."""
        ...

    def all(self) -> Pair:
        """All tokens."""
        ...

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens without showing any."""

    def part(self, first: int, stop: int) -> Pair:
        """Tokens `first` to `stop`."""
        ...

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Have these instead."""

    def clear(self) -> None:
        """Have none."""

    def choose(self, kept: int, offsets: Sequence[int]) -> None:
        """Keep the first `kept` tokens, and of those behind them the ones at `offsets`, ascending."""

    def take_rows(self, indices: Sequence[int]) -> None:
        """Have the rows at `indices`."""


class TextLayers(Protocol):
    """The layers of a text. At most about `expected_tokens` will come; more may."""

    expected_tokens: int

    def new_layer(self, expected_tokens: int | None = None) -> GrowingStates:
        """The states of the next layer. `expected_tokens` are its own, if they are not the text's."""
        ...

    def end_turn_before(self, layer: GrowingStates | None) -> None:
        """End the turn of every layer but `layer`."""

    def fork(self) -> tuple[TextLayers, Mapping[Any, GrowingStates]]:
        """A text that begins with the same tokens, and for each layer its own."""
        ...


class TieredLayer(DynamicLayer):
    """A layer that holds keys and values of all tokens in `states`."""

    def __init__(self, states: GrowingStates) -> None:
        self._given: list[torch.Tensor | None] = [None, None]
        self.states = states
        self._is_made = False
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_made = True

    # `keys` and `values` are attributes of transformers' layers: read, and assigned one after the other.

    @property
    def keys(self) -> torch.Tensor | None:
        """[rows, heads, tokens, width]; None before the first."""
        return self._shown(0)

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._give(0, states)

    @property
    def values(self) -> torch.Tensor | None:
        """[rows, heads, tokens, value width]; None before the first."""
        return self._shown(1)

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._give(1, states)

    def _shown(self, index: int) -> torch.Tensor | None:
        if self._given[index] is not None:
            return self._given[index]
        return None if self.states.is_empty else self.states.all()[index]

    def _give(self, index: int, states: torch.Tensor | None) -> None:
        if not self._is_made:
            return  # transformers' layers begin with none
        self._given[index] = states
        keys, values = self._given
        if states is None:
            self.states.clear()
        elif keys is not None and values is not None:
            self.states.replace(keys, values)
            self._given = [None, None]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note the device and the dtype."""
        del value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Add tokens; all so far."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.states.append(key_states, value_states)

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens that were computed earlier."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.states.extend(keys, values)

    def get_seq_length(self) -> int:
        """The number of tokens."""
        return self.states.tokens

    def offload(self) -> None:
        """Do nothing: it moves by itself."""

    def prefetch(self) -> None:
        """Do nothing: it moves by itself."""

    def reset(self) -> None:
        """Forget all."""
        self._given = [None, None]
        self.states.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens. Raises ValueError for a positive number, as other layers do."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        self.choose(max(0, self.states.tokens + tokens_to_remove), ())

    def choose(self, kept: int, offsets: Sequence[int]) -> None:
        """Keep the first `kept` tokens, and of those behind them the ones at `offsets`, ascending."""
        if not self.states.is_empty:
            self.states.choose(kept, offsets)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Continue the beams at `beam_idx`."""
        self._take_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if not self.states.is_empty:
            self._take_rows([row for row in range(self.states.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`, or where they are True."""
        if not self.states.is_empty:
            self._take_rows(torch.arange(self.states.rows, device="cpu")[indices.cpu()].tolist())

    def _take_rows(self, indices: Sequence[int]) -> None:
        if not self.states.is_empty and list(indices) != list(range(self.states.rows)):
            self.states.take_rows(indices)


class TieredCache(DynamicCache):
    """The cache of `generate`, with the layers at `tiered` in `text`. Others forget tokens or have states of one size: they are
    what they are by default."""

    def __init__(self, config: PretrainedConfig, tiered: Collection[int], text: TextLayers) -> None:
        super().__init__(config=config)
        self.text = text
        for index in sorted(set(tiered) & set(growing_indices(self.layers))):
            self.layers[index] = TieredLayer(text.new_layer())

    @classmethod
    def of(cls, cache: DynamicCache, states: Mapping[int, GrowingStates], text: TextLayers) -> Self:
        """`cache`, which is new, with the layers at the indices of `states` there."""
        made = object.__new__(cls)
        vars(made).update(vars(cache), text=text)
        made.layers = [TieredLayer(states[index]) if index in states else layer for index, layer in enumerate(cache.layers)]
        return made

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        """transformers' `update`, with which the turn of the layer before ends."""
        layer = self.layers[layer_idx]
        self.text.end_turn_before(layer.states if isinstance(layer, TieredLayer) else None)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A text that continues the same tokens: what lies elsewhere is shared, not copied."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update({name: value for name, value in vars(self).items() if name not in ("layers", "text")})
        copied.text, states = _fork_once(self.text, memo)
        copied.layers = [_copy_layer(layer, states, memo) for layer in self.layers]
        return copied


def _fork_once(text: TextLayers, memo: dict[Any, Any]) -> tuple[TextLayers, Mapping[Any, GrowingStates]]:
    """The fork of a text in one deep copy: the caches of a decoder and of its encoder are of the same."""
    key = "fork", id(text)
    if key not in memo:
        memo[key] = text.fork()
    forked: tuple[TextLayers, Mapping[Any, GrowingStates]] = memo[key]
    return forked


def _copy_layer(layer: Any, states: Mapping[Any, GrowingStates], memo: dict[int, Any]) -> Any:
    if not isinstance(layer, TieredLayer):
        return copy.deepcopy(layer, memo)
    copied = TieredLayer(states[layer.states])
    if layer.is_initialized:
        copied.dtype, copied.device, copied.is_initialized = layer.dtype, layer.device, True
    return copied


def put_pair_in_tiers(cache: EncoderDecoderCache, count: int, text: TextLayers, read_tokens: int) -> None:
    """Let `count` layers of a new cache have the decoder's own keys and values in `text`, and those of the `read_tokens` that
    its encoder read, of which none come later; spread over the depth."""
    own, read = cache.self_attention_cache, cache.cross_attention_cache
    states: tuple[dict[int, GrowingStates], dict[int, GrowingStates]] = {}, {}
    for index in spread(growing_pairs(cache), count):
        states[0][index], states[1][index] = text.new_layer(), text.new_layer(read_tokens)  # in the order of a pass
    cache.self_attention_cache, cache.cross_attention_cache = (
        TieredCache.of(each, some, text) for each, some in zip((own, read), states, strict=True)
    )


def growing_pairs(cache: EncoderDecoderCache) -> list[int]:
    """The layers of which both caches are dynamic, and hold all tokens' keys and values and nothing else."""
    caches = cache.self_attention_cache, cache.cross_attention_cache
    if any(type(each) is not DynamicCache or each.offloading for each in caches):
        return []
    own, read = (growing_indices(each.layers) for each in caches)
    return sorted(set(own) & set(read))


def spread(indices: Sequence[int], count: int) -> list[int]:
    """`count` of them, all if they are fewer, evenly."""
    count = min(count, len(indices))
    return [indices[at * len(indices) // count] for at in range(count)]


def part_of(layer: DynamicLayer, first: int, stop: int) -> Pair:
    """Keys and values of tokens `first` to `stop` of a layer that holds all."""
    if isinstance(layer, TieredLayer):
        return layer.states.part(first, stop)
    assert layer.keys is not None  # noqa: S101 - it holds all
    assert layer.values is not None  # noqa: S101
    return layer.keys[:, :, first:stop], layer.values[:, :, first:stop]


def growing_indices(layers: Sequence[Any]) -> list[int]:
    """The layers that only add keys and values, and never forget any."""
    return [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
