"""A layer of a dynamic cache that has room for the tokens to come: adding one does not copy those before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

Pair = tuple[torch.Tensor, torch.Tensor]

_LEAST_ROOM, _SHARE_OF_ROOM = 256, 4
"""Room for at least so many more tokens, or for one to four that are there."""
_ALIGNED = 64
"""Room for multiples of so many tokens: the first token of each head is then as aligned as the first of all."""


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer`, whose keys and values are views of memory for more tokens: up to `most`, if so many come,
    the first `soon` of them at once.

    What others assign to `keys` and `values` replaces them, as in the original. Tokens that a copy of the layer shares stay as
    they are, also after a `crop`.
    """

    def __init__(self, soon: int, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.expect(soon, most)
        self._room: Pair | None = None
        self._shared = 0

    def expect(self, soon: int, most: int) -> None:
        """Up to `most` tokens will come, the first `soon` of them at once."""
        self._soon, self._most = soon, most

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Add tokens; all so far."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.get_seq_length()
        stop = first + key_states.shape[-2]
        if not self._has_room(first, stop, len(key_states)):
            self._make_room(first, stop, (key_states, value_states))
        assert self._room is not None  # noqa: S101 - it was made
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, first:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self._room)
        return self.keys, self.values

    def _has_room(self, first: int, stop: int, rows: int) -> bool:
        """Whether the tokens are those in the room, with place behind them that nobody shares."""
        if self._room is None or first < self._shared or stop > self._room[0].shape[2] or len(self._room[0]) != rows:
            return False
        return not first or all(_begins(room, states) for room, states in zip(self._room, self._shown(), strict=True))

    def _shown(self) -> Pair:
        assert self.keys is not None  # noqa: S101 - it has tokens
        assert self.values is not None  # noqa: S101
        return self.keys, self.values

    def _make_room(self, first: int, stop: int, added: Pair) -> None:
        """Claim memory like that of the tokens to be `added`, and copy those that are there."""
        tokens = max(stop, min(self._most, _with_room(max(stop, self._soon))))
        tokens += -tokens % _ALIGNED
        with torch.inference_mode(mode=False):  # a pass in that mode may be followed by one that is not
            made = [
                torch.empty((*states.shape[:2], tokens, states.shape[3]), dtype=states.dtype, device=states.device)
                for states in added
            ]
        self._room, self._shared = (made[0], made[1]), 0
        if first:
            for room, states in zip(made, self._shown(), strict=True):
                room[:, :, :first] = states

    def saved(self) -> Mapping[str, Any]:
        """What `restore` needs: its tokens stay as they are, also where others are added after an earlier one."""
        self._shared = max(self._shared, self.get_seq_length())
        return dict(vars(self))

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Have the tokens that it had when they were `saved`."""
        shared = self._shared if self._room is saved["_room"] else 0
        vars(self).update(saved)
        self._shared = max(self._shared, shared)

    def reset(self) -> None:
        """Forget all. In old releases the original fills its tokens with zeros, and keeps them."""
        self._room = self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A layer of the same tokens, with room of its own once it adds some; keys and values in `memo` are shared."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(vars(self))
        copied._room = None
        for name in ("keys", "values"):
            states: Any = getattr(self, name)
            if states is None:
                continue
            if id(states) not in memo:
                memo[id(states)] = states.clone()
            setattr(copied, name, memo[id(states)])
            self._shared = max(self._shared, states.shape[-2])
        return copied


def growing_cache(config: PretrainedConfig, soon: int, most: int) -> DynamicCache:
    """The cache of `generate`, whose layers that never forget have room for `most` tokens, `soon` of which come at once."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(soon, most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _with_room(tokens: int) -> int:
    return tokens + max(_LEAST_ROOM, tokens // _SHARE_OF_ROOM)


def _begins(room: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether `states` are the first in the room."""
    return states.data_ptr() == room.data_ptr() and states.stride() == room.stride() and states.dtype == room.dtype
