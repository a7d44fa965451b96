"""What layers that forget hold at the ends of blocks of a text: the newest keys of a window, states of the whole text.

It is copied while a prompt is computed in parts, before the next part changes it, and put into new caches later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import Cache
from transformers.cache_utils import DynamicSlidingWindowLayer

from rabbit_engine.transformers_bridge.caches import state_layers, windows_of

_KINDS = ("conv", "recurrent")

Copies = Mapping[int, Mapping[str, torch.Tensor]]
"""By block, tensors by name."""


@dataclass(frozen=True, slots=True)
class EndsRecipe:
    """The arguments of `BlockEnds` for the part of a cache that is elsewhere."""

    ends: tuple[int, ...]
    block_tokens: int
    prompt: int
    begun: int


class BlockEnds:
    """Copies of what the layers of one text have forgotten, or will have, at `ends`: numbers of whole blocks, the most useful
    first. The last of them are given up while `is_over` says that copies take too much memory.

    Layers that hold all of the `prompt` tokens forget nothing. The first `begun` of them are not computed again.
    """

    def __init__(
        self, cache: Cache, ends: Sequence[int], block_tokens: int, prompt: int, begun: int, is_over: Callable[[], bool]
    ) -> None:
        self.begun, self.nbytes, self._prompt = begun, 0, prompt
        self._ends, self._size, self._is_over = list(ends), block_tokens, is_over
        self._layers: list[Any] = cache.layers
        self._windows = short_windows(cache, prompt)
        self._states = state_layers(cache)
        self._blocks: dict[int, dict[str, torch.Tensor]] = {}

    @classmethod
    def made(cls, cache: Cache, recipe: EndsRecipe) -> Self:
        """Those of layers elsewhere, whose copies go to where the recipe is from."""
        return cls(cache, recipe.ends, recipe.block_tokens, recipe.prompt, recipe.begun, lambda: False)

    @property
    def recipe(self) -> EndsRecipe:
        """What layers elsewhere need."""
        return EndsRecipe(tuple(self._ends), self._size, self._prompt, self.begun)

    @property
    def copies(self) -> Copies:
        """All that was copied and is needed."""
        return self._blocks

    def merge(self, copies: Copies) -> None:
        """Have these too, of layers elsewhere."""
        for block, held in copies.items():
            for name, states in held.items():
                self._add(block, name, states)

    @property
    def tokens(self) -> list[int]:
        """The ends in tokens, ascending: a part must end at each."""
        return sorted(end * self._size for end in self._ends)

    @property
    def layers(self) -> Collection[int]:
        """The layers that forget keys."""
        return self._windows.keys()

    def take_keys(self, layer: int, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy what is needed of a layer's keys and values [1, heads, tokens, width], the first of which is token `first`."""
        window = self._windows.get(layer)
        if window is None:
            return
        for block in range(first // self._size, (first + keys.shape[-2]) // self._size):
            stop = (block + 1) * self._size - first
            kept = slice(stop - min(self._size, window - 1), stop)
            if stop >= self._size:
                self._add(block, f"{layer}.keys", keys[0, :, kept])
                self._add(block, f"{layer}.values", values[0, :, kept])

    def take_state(self, layer: int, kind: str, number: int, tokens: int) -> None:
        """Copy a state of a layer after `tokens`, if an end is there."""
        if tokens % self._size == 0:
            name = f"{layer}.{kind}.{number}"
            self._add(tokens // self._size - 1, name, states_of(self._layers[layer], layer)[name][0])

    def _add(self, block: int, name: str, states: torch.Tensor) -> None:
        if not self._is_needed(block, name):
            return
        held = self._blocks.setdefault(block, {})
        self.nbytes -= held[name].nbytes if name in held else 0
        held[name] = torch.empty(states.shape, dtype=states.dtype, device="cpu").copy_(states.detach())
        self.nbytes += held[name].nbytes
        while self._ends and self._is_over():
            self._ends.pop()
            self._drop_unneeded()

    def _drop_unneeded(self) -> None:
        for block, held in self._blocks.items():
            for name in [name for name in held if not self._is_needed(block, name)]:
                self.nbytes -= held.pop(name).nbytes

    def _is_needed(self, block: int, name: str) -> bool:
        if is_state(name):
            return block + 1 in self._ends
        window = self._windows[layer_of(name)]
        return any(block in blocks_seen(end, window, self._size) for end in self._ends)

    def finished(self) -> list[int]:
        """The ends at which all that is needed was copied, ascending."""
        return sorted(end for end in self._ends if self._is_whole(end))

    def _is_whole(self, end: int) -> bool:
        names = [(end - 1, name) for layer in self._states for name in states_of(self._layers[layer], layer)]
        for layer, window in self._windows.items():
            if self._layers[layer].is_initialized:
                blocks = [block for block in blocks_seen(end, window, self._size) if block * self._size >= self.begun]
                names += [(block, f"{layer}.keys") for block in blocks]
        return all(name in self._blocks.get(block, ()) for block, name in names)

    def of(self, block: int) -> Mapping[str, torch.Tensor]:
        """The copies of a block, by name: [heads, tokens, width] of a window, states without their first dimension."""
        return self._blocks.get(block, {})

    def drop(self, block: int) -> None:
        """Forget the copies of a block."""
        self.nbytes -= sum(tensor.nbytes for tensor in self._blocks.pop(block, {}).values())


def short_windows(cache: Cache, prompt: int) -> dict[int, int]:
    """The layers that do not hold all keys and values of a prompt after it, and their windows."""
    return {layer: window for layer, window in windows_of(cache).items() if window is not None and window <= prompt}


def blocks_seen(end: int, window: int, block_tokens: int) -> range:
    """The blocks of which a layer with this window holds tokens after the first `end` blocks."""
    return range(max(0, end * block_tokens - window + 1) // block_tokens, end if window > 1 else 0)


def states_of(layer: Any, index: int) -> dict[str, torch.Tensor]:
    """The states [rows, ...] of a layer that has any, by name."""
    tables = {kind: getattr(layer, f"{kind}_states") for kind in _KINDS}
    return {f"{index}.{kind}.{number}": state for kind in _KINDS for number, state in tables[kind].items() if state is not None}


def is_state(name: str) -> bool:
    """Whether a name is that of a state, not of keys or values."""
    return any(f".{kind}." in name for kind in _KINDS)


def layer_of(name: str) -> int:
    """The layer of a tensor's name."""
    return int(name.split(".")[0])


def put_ends(cache: Cache, tokens: int, states: Mapping[str, torch.Tensor]) -> None:
    """Let the layers of a new cache that forget be as after `tokens` tokens: `states` has the newest keys and values
    [1, heads, tokens, width] of windows, at least those that are seen, and states [1, ...]."""
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        keys, values = (states.get(f"{index}.{kind}") for kind in ("keys", "values"))
        if keys is not None and values is not None and isinstance(layer, DynamicSlidingWindowLayer):
            seen = min(layer.sliding_window - 1, tokens)
            layer.update(keys[:, :, keys.shape[-2] - seen :], values[:, :, values.shape[-2] - seen :])
            layer.cumulative_length = tokens
        for name in _states_at(states, index):
            kind, number = name.split(".")[1:]
            getattr(layer, f"update_{kind}_state")(states[name], int(number))


def _states_at(states: Iterable[str], layer: int) -> list[str]:
    return [name for name in states if layer_of(name) == layer and is_state(name)]


_ATTRIBUTE = "block_ends"


def watch_ends(cache: Cache, ends: BlockEnds | None) -> None:
    """Let the parts of a prompt that are computed with `cache` from now on tell `ends`; nobody if that is None."""
    setattr(cache, _ATTRIBUTE, ends)


def ends_of(cache: object) -> BlockEnds | None:
    """Who watches the cache."""
    return getattr(cache, _ATTRIBUTE, None)
