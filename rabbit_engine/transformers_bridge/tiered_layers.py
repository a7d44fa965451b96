"""Layers of a dynamic cache that keep their keys and values elsewhere, and have them whole only while they run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

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

    def saved(self) -> Any:
        """What `restore` needs."""
        ...

    def restore(self, saved: Any) -> None:
        """Have the tokens that it had when they were `saved`."""


class WindowedStates(GrowingStates, Protocol):
    """Those of the tokens that were not forgotten."""

    def forget(self, count: int) -> None:
        """Forget the first `count` tokens."""


class TextLayers(Protocol):
    """The layers of a text. At most about `expected_tokens` will come; more may."""

    expected_tokens: int

    def new_layer(self, expected_tokens: int | None = None) -> GrowingStates:
        """The states of the next layer. `expected_tokens` are its own, if they are not the text's."""
        ...

    def new_window(self) -> WindowedStates:
        """The states of the next layer, which forgets tokens."""
        ...

    def end_turn_before(self, layer: GrowingStates | None) -> None:
        """End the turn of every layer but `layer`."""

    def fork(self) -> tuple[TextLayers, Mapping[Any, GrowingStates]]:
        """A text that begins with the same tokens, and for each layer its own."""
        ...


class LayerInStates:
    """What layers have in common that hold keys and values in `states`."""

    states: GrowingStates
    is_initialized: bool

    def __init__(self, states: GrowingStates, *given: Any) -> None:
        self._given: list[torch.Tensor | None] = [None, None]
        self.states = states
        self._is_made = False
        super().__init__(*given)
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

    def offload(self) -> None:
        """Do nothing: it moves by itself."""

    def prefetch(self) -> None:
        """Do nothing: it moves by itself."""

    def reset(self) -> None:
        """Forget all."""
        self._given = [None, None]
        self.states.clear()
        self.is_initialized = False

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


class TieredLayer(LayerInStates, DynamicLayer):
    """A layer that holds keys and values of all tokens in `states`."""

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

    def as_plain(self) -> DynamicLayer:
        """A layer of transformers with the same tokens, all of them in memory."""
        plain: DynamicLayer = _fill(DynamicLayer(), self)
        return plain

    def get_seq_length(self) -> int:
        """The number of tokens."""
        return self.states.tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens. Raises ValueError for a positive number, as other layers do."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        self.choose(max(0, self.states.tokens + tokens_to_remove), ())

    def choose(self, kept: int, offsets: Sequence[int]) -> None:
        """Keep the first `kept` tokens, and of those behind them the ones at `offsets`, ascending."""
        if not self.states.is_empty:
            self.states.choose(kept, offsets)

    def saved(self) -> tuple[bool, Any]:
        """What `restore` needs."""
        return self.is_initialized, self.states.saved()

    def restore(self, saved: tuple[bool, Any]) -> None:
        """Have the tokens that it had when they were `saved`."""
        self.is_initialized, states = saved
        self.states.restore(states)


def plain_facts(layer: TieredLayer | TieredWindowLayer) -> dict[str, Any]:
    """The attributes of `as_plain`, with keys and values that have no memory."""
    facts: dict[str, Any] = {"is_initialized": layer.is_initialized}
    if layer.is_initialized:
        facts |= {"dtype": layer.dtype, "device": layer.device}
    if not layer.states.is_empty:
        shapes = [(states.shape, states.dtype) for states in layer.states.part(0, 0)]
        for name, (shape, dtype) in zip(("keys", "values"), shapes, strict=True):
            facts[name] = torch.empty((*shape[:2], layer.states.tokens, shape[3]), dtype=dtype, device="meta")
    if isinstance(layer, TieredWindowLayer):
        facts |= {"cumulative_length": layer.cumulative_length, "record_past": layer.record_past}
    return facts


def _fill(plain: Any, layer: TieredLayer | TieredWindowLayer) -> Any:
    """Transformers' own layer, with a copy of what the other holds."""
    if not layer.states.is_empty:
        keys, values = layer.states.part(0, layer.states.tokens)
        plain.lazy_initialization(keys, values)
        plain.keys, plain.values = keys.clone(), values.clone()
    return plain


class TieredWindowLayer(LayerInStates, DynamicSlidingWindowLayer):
    """A layer that holds keys and values of a window in `states`: what transformers' layer would, with the same refusals."""

    states: WindowedStates

    def __init__(self, states: WindowedStates, sliding_window: int) -> None:
        super().__init__(states, sliding_window)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Add tokens; those of the window before them, and they."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        self.cumulative_length += count
        keys, values = self.states.append(key_states, value_states)
        if not self.record_past:
            self._forget()
            return keys, values
        visible = recorded_keys(self.sliding_window, count)
        return keys[:, :, -visible:], values[:, :, -visible:]

    def _forget(self) -> None:
        self.states.forget(max(0, self.states.tokens - self.sliding_window + 1))

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens. Raises as transformers' layer does for a positive number, and once the window
        is full for a layer that does not record the past."""
        is_full = self.get_seq_length() >= self.sliding_window
        if tokens_to_remove > 0 or (is_full and not self.record_past):
            super().crop(tokens_to_remove)
        elif is_full or tokens_to_remove:
            self.choose(max(0, self.cumulative_length + tokens_to_remove), ())

    def choose(self, kept: int, offsets: Sequence[int]) -> None:
        """Keep the first `kept` tokens of all that there were, and of those behind them the ones at `offsets`, ascending."""
        if not self.states.is_empty:
            forgotten = self.cumulative_length - self.states.tokens
            self.states.choose(max(0, kept - forgotten), offsets)
            self.cumulative_length = kept + len(offsets)
            self._forget()

    def as_plain(self) -> DynamicSlidingWindowLayer:
        """A layer of transformers with the same tokens, all of them in memory."""
        plain: DynamicSlidingWindowLayer = _fill(DynamicSlidingWindowLayer(self.sliding_window), self)
        plain.cumulative_length, plain.record_past = self.cumulative_length, self.record_past
        return plain

    def saved(self) -> tuple[int, bool, Any]:
        """What `restore` needs."""
        return self.cumulative_length, self.is_initialized, self.states.saved()

    def restore(self, saved: tuple[int, bool, Any]) -> None:
        """Have the tokens that it had when they were `saved`."""
        self.cumulative_length, self.is_initialized, states = saved
        self.states.restore(states)


TIERED = (TieredLayer, TieredWindowLayer)


def recorded_keys(window: int, rows: int) -> int:
    """How many of its newest keys a sliding layer that records the past shows to a pass over that many rows, if it has more."""
    return window - 1 + rows if _shows_its_window() else _ALL


_ALL = 1 << 30


@functools.cache
def _shows_its_window() -> bool:
    """Whether such a layer hides keys before its window in the second of several passes; releases differ."""
    layer, states = DynamicSlidingWindowLayer(2), torch.zeros(1, 1, 2, 1)
    layer.activate_past_recording()
    layer.update(states, states)
    keys, _ = layer.update(states, states)
    return keys.shape[-2] == 3
