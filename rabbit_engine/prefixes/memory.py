"""Blocks in memory: those used last, up to a number of bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from rabbit_engine.prefixes.blockfile import BlockHeader
from rabbit_engine.prefixes.keys import BlockKey
from rabbit_engine.storage.directio import aligned_up


@dataclass(frozen=True, slots=True)
class HeldBlock:
    """A block with those of its `tensors` that are in memory; None for `header` if all are."""

    key: BlockKey
    header: BlockHeader | None
    tensors: Mapping[str, torch.Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all its tensors, as they were written."""
        return tuple(self.tensors if self.header is None else self.header.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(aligned_up(tensor.numel() * tensor.itemsize) for tensor in self.tensors.values())

    @property
    def whole_bytes(self) -> int:
        """Bytes with all its tensors in memory."""
        return self.nbytes if self.header is None else sum(aligned_up(entry.nbytes) for entry in self.header.tensors.values())

    def with_tensors(self, more: Mapping[str, torch.Tensor]) -> HeldBlock:
        """The same block with more of its tensors."""
        return replace(self, tensors={**self.tensors, **more})


class BlockMemory:
    """Blocks by their file names. All of a text's are used at once, and the end of a text leaves before its beginning."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._blocks: dict[str, HeldBlock] = {}
        self._used: dict[str, int] = {}
        self._clock = 0
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._nbytes

    def get(self, key: BlockKey) -> HeldBlock | None:
        """The block, if it is here and has the same tokens."""
        with self._lock:
            found = self._blocks.get(key.file)
        return found if found is not None and found.key == key else None

    def put(self, block: HeldBlock) -> None:
        """Keep the block, and drop those used least recently, if it is small enough to be kept."""
        file, nbytes = block.key.file, block.nbytes
        if nbytes > self.most_bytes:
            return
        with self._lock:
            self._forget(file)
            self._blocks[file] = block
            self._nbytes += nbytes
            self._used.setdefault(file, self._clock)
            while self._nbytes > self.most_bytes:
                self._forget(min(self._blocks, key=self._age))

    def use(self, keys: Iterable[BlockKey]) -> None:
        """Note that the blocks are used now, together; some need not be here yet."""
        with self._lock:
            self._clock += 1
            self._used = {file: when for file, when in self._used.items() if file in self._blocks}
            self._used.update((key.file, self._clock) for key in keys)

    def discard(self, key: BlockKey) -> None:
        """Drop a block."""
        with self._lock:
            self._forget(key.file)

    def clear(self, space: str | None = None) -> None:
        """Drop all blocks, or those of a space."""
        with self._lock:
            for file in [file for file, block in self._blocks.items() if space in (None, block.key.space)]:
                self._forget(file)

    def _age(self, file: str) -> tuple[int, int]:
        return self._used.get(file, 0), -self._blocks[file].key.index

    def _forget(self, file: str) -> None:
        block = self._blocks.pop(file, None)
        if block is not None:
            self._nbytes -= block.nbytes
