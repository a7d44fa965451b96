"""The memory in which a layer's keys and values are whole while it runs."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from rabbit_engine.storage.directio import claim_memory
from rabbit_engine.streaming.caches.blocks import Pair


class BufferPool:
    """Memory that is used again when no tensor shows it any more: touching new memory costs as much as copying to it."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._lock = threading.RLock()  # forked texts may run in several threads; finalizers run in any, also amid `take`

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the CPU, page-aligned, with any contents."""
        memory = self._take_free(nbytes)
        if memory is None:
            memory = claim_memory(nbytes)
        shown = np.asarray(memory.numpy())[:nbytes]
        weakref.finalize(shown, self._free_again, memory).atexit = False
        return torch.from_numpy(shown)

    def _take_free(self, nbytes: int) -> torch.Tensor | None:
        """The smallest that is large enough; if none is, return all to the system."""
        with self._lock:
            fitting = [memory for memory in self._free if nbytes <= memory.nbytes <= 2 * nbytes]
            memory = min(fitting, key=lambda found: found.nbytes, default=None)
            self._free = [] if memory is None else [other for other in self._free if other is not memory]
            return memory

    def _free_again(self, memory: torch.Tensor) -> None:
        self._free.append(memory)

    def clear(self) -> None:
        """Return what is free to the system."""
        self._free = []


class LayerBuffer:
    """Keys and values of a layer, of `tokens` tokens, with room for up to `capacity`.

    Views of it stay as they are: tokens are only added behind those that it had. On a device with memory of its own the blocks
    arrive in host memory first, `arriving`.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, arriving: Pair) -> None:
        self._keys, self._values, self._arriving = keys, values, arriving
        self.tokens = 0

    @classmethod
    def like(cls, states: Pair, rows: int, capacity: int, pool: BufferPool) -> Self:
        """A new one for `rows` rows of the shape, dtype and device of `states`."""
        device = states[0].device
        with torch.inference_mode(mode=False):  # a pass in that mode may be followed by one that is not
            arriving = [_claim(tensor, rows, capacity, pool) for tensor in states]
            here = arriving if device.type == "cpu" else [torch.empty_like(a, device=device) for a in arriving]
        return cls(here[0], here[1], (arriving[0], arriving[1]))

    @property
    def capacity(self) -> int:
        """The tokens that it has room for."""
        return self._keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._keys.nbytes + self._values.nbytes

    @property
    def arriving(self) -> Pair:
        """Where blocks are read to, on the CPU."""
        return self._arriving

    def take_rows(self, indices: Sequence[int], tokens: int) -> None:
        """Have the rows at `indices` of the first `tokens` tokens that were read, in place, a head at a time."""
        for states in self._arriving:
            chosen = torch.tensor(list(indices), device="cpu")
            for head in range(states.shape[1]):
                shown = states[:, head, :tokens]
                shown.copy_(shown.index_select(0, chosen))

    def arrived(self, tokens: int) -> None:
        """The first `tokens` tokens were read to `arriving`."""
        if self._keys.device.type != "cpu":
            self._keys[:, :, :tokens].copy_(self._arriving[0][:, :, :tokens])
            self._values[:, :, :tokens].copy_(self._arriving[1][:, :, :tokens])
        self.tokens = tokens

    def add(self, states: Pair) -> None:
        """Append tokens, for which there is room."""
        stop = self.tokens + states[0].shape[2]
        self._keys[:, :, self.tokens : stop] = states[0]
        self._values[:, :, self.tokens : stop] = states[1]
        self.tokens = stop

    def without_first(self, tokens: int) -> LayerBuffer:
        """The same memory, without its first `tokens` tokens and their room."""
        rest = LayerBuffer(self._keys[:, :, tokens:], self._values[:, :, tokens:], self._arriving)
        rest.tokens = self.tokens - tokens
        return rest

    def view(self, first: int = 0, stop: int | None = None) -> Pair:
        """Those of tokens `first` to `stop`, or to the last, without a copy."""
        stop = self.tokens if stop is None else stop
        return self._keys[:, :, first:stop], self._values[:, :, first:stop]


def _claim(states: torch.Tensor, rows: int, capacity: int, pool: BufferPool) -> torch.Tensor:
    """An uninitialised CPU tensor [rows, heads, capacity, width] of the dtype of `states`."""
    shape: Sequence[int] = (rows, states.shape[1], capacity, states.shape[3])
    nbytes = math.prod(shape) * states.element_size()
    return pool.take(nbytes).view(states.dtype).view(shape) if nbytes else torch.empty(shape, dtype=states.dtype, device="cpu")
