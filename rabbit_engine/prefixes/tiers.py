"""Where blocks are: waiting to be written, in memory, or in the folder. Faults of the disk end here."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from rabbit_engine.errors import BudgetError, MissingFileError, RabbitError, first_line
from rabbit_engine.prefixes.blockfile import read_tensors
from rabbit_engine.prefixes.folder import StoreFolder
from rabbit_engine.prefixes.keys import BlockKey
from rabbit_engine.prefixes.memory import BlockMemory, HeldBlock
from rabbit_engine.prefixes.writer import BlockWriter, WriteRequest
from rabbit_engine.utils.sizes import format_bytes

logger = logging.getLogger(__name__)

PAUSE_S = 60.0
"""How long nothing is stored after the disk refused a block."""

_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of the process, not of a file: the file stays."""


Parts = torch.Tensor | Sequence[torch.Tensor]
"""A tensor, or several of one shape and dtype that are stored as one with one more dimension, the first."""


class BlockTiers:
    """The blocks of a store. Without a `folder` they are in memory alone; in a forked child there are none."""

    def __init__(self, folder: StoreFolder | None, memory_bytes: int, queue_bytes: int, log_level: int = logging.WARNING) -> None:
        self.folder, self._log_level = folder, log_level
        self.memory = BlockMemory(memory_bytes)
        self.writer = BlockWriter(self._write, queue_bytes)
        self._owner: int | None = os.getpid()
        self._resumes_at = 0.0
        self._said: set[str] = set()
        self._saying = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether blocks are looked up and stored: in the process that opened the store, until it is closed."""
        return self._owner == os.getpid()

    def find(self, keys: Iterable[BlockKey]) -> list[HeldBlock | BlockKey]:
        """The blocks of the first keys, up to one that is not stored; only the key of one that is in the folder alone, of which
        nothing is read. They count as used now."""
        found: list[HeldBlock | BlockKey] = []
        for key in keys if self.is_open else ():
            block = self._look_up(key)
            if block is None:
                break
            found.append(block)
        if found:
            used = [block if isinstance(block, BlockKey) else block.key for block in found]
            self.memory.use(used)
            if self.folder is not None:
                self.folder.touch(used[-1])
        return found

    def _look_up(self, key: BlockKey) -> HeldBlock | BlockKey | None:
        waiting = self.writer.pending(key)
        if waiting is not None:
            return waiting
        held = self.memory.get(key)
        if self.folder is None or (held is not None and self.folder.has(key)):
            return held
        self.memory.discard(key)  # evicted or cleared, perhaps by another process
        return key if held is None and self.folder.has(key) else None

    def open(self, key: BlockKey) -> HeldBlock | None:
        """A block in the folder with its header, compared with the key; None if it is not whole."""
        if self.folder is None or not self.is_open:
            return None
        try:
            return HeldBlock(key, self.folder.read_header(key), {})
        except RabbitError as error:
            self._give_up(key, error)
            return None

    def fetch(self, block: HeldBlock, names: Collection[str]) -> HeldBlock | None:
        """The block with the tensors of these names; None if it is not whole any more."""
        header = block.header
        if header is None or not self.is_open:
            return None
        try:
            whole = block.with_tensors(read_tensors(header, names))
        except RabbitError as error:
            self._give_up(block.key, error, header.inode)
            return None
        self.memory.put(whole)
        return whole

    def _give_up(self, key: BlockKey, error: RabbitError, inode: int | None = None) -> None:
        """Delete a block that cannot be read, and say so."""
        self.memory.discard(key)
        if isinstance(error, MissingFileError) or self.folder is None:
            return
        if isinstance(error, BudgetError) or getattr(error.__cause__, "errno", None) in _PASSING:
            self._say("reading", f"a stored block is not used: {first_line(error)}")
            return
        what = "deleted" if self.folder.discard(key, inode) else "left out, as it cannot be deleted"
        self._say(key.file, f"a stored block is {what}, and its tokens are computed again: {first_line(error)}")

    def add(self, keys: Sequence[BlockKey], tensors: Mapping[str, Parts], about: str) -> bool:
        """Store a copy of the block of the last key, which follows those before it; False if there is no room for it now."""
        key, nbytes = keys[-1], sum(map(_bytes_of, tensors.values()))
        if not self.is_open:
            return False
        if self.folder is None:
            return self._remember(keys, tensors, nbytes)
        if (pending := self.writer.pending(key)) is not None:
            return tensors.keys() <= set(pending.names)  # one with more of the block's tensors waits until it is written
        if self.folder.holds(key, tensors.keys()):
            return True
        if time.monotonic() < self._resumes_at or not self._follows(keys, self.folder):
            return False
        clearing = self.folder.clearing()
        request = self.writer.offer(nbytes, lambda: WriteRequest(HeldBlock(key, None, _copied(tensors)), about, clearing, nbytes))
        if request is None:
            if nbytes > self.writer.largest_bytes:
                limit = format_bytes(self.writer.most_bytes)
                self._say("size", f"prefixes are not stored: a block has {format_bytes(nbytes)}, the queue for them {limit}")
            return False
        self._keep(keys, request.block)
        return True

    def _follows(self, keys: Sequence[BlockKey], folder: StoreFolder) -> bool:
        """Whether the block before the last is stored, or will be: otherwise no lookup reaches the last."""
        return len(keys) == 1 or self.writer.pending(keys[-2]) is not None or folder.has(keys[-2])

    def _remember(self, keys: Sequence[BlockKey], tensors: Mapping[str, Parts], nbytes: int) -> bool:
        """Keep a copy in memory alone."""
        held = self.memory.get(keys[-1])
        if held is not None and set(held.names) >= tensors.keys():
            self.memory.use(keys)
            return True
        if nbytes > self.memory.most_bytes:
            return False
        self._keep(keys, HeldBlock(keys[-1], None, _copied(tensors)))
        return True

    def _keep(self, keys: Sequence[BlockKey], block: HeldBlock) -> None:
        self.memory.use(keys)
        self.memory.put(block)

    def _write(self, request: WriteRequest) -> None:
        """Runs in the writer's thread."""
        block = request.block
        try:
            if self.folder is not None:
                self.folder.store(block.key, block.tensors, request.about, request.clearing)
        except (OSError, RabbitError) as error:
            self._resumes_at = time.monotonic() + PAUSE_S
            self.writer.drop()
            self._say("writing", f"prefixes are not stored for now, answers go on: {first_line(error)}")

    def clear(self, spaces: Collection[str] | None = None) -> None:
        """Drop the blocks of all spaces, or of these, wherever they are. Raises PrefixStoreError for files that remain."""
        for space in (None,) if spaces is None else spaces:
            self.writer.drop(space)
            self.memory.clear(space)
        if self.folder is not None:
            self.folder.clear(spaces)

    def close(self, timeout_s: float) -> None:
        """Write what waits, for `timeout_s` at most, and end the thread. Nothing is found or stored afterwards."""
        if self.is_open:
            self.writer.close(timeout_s)
            self._owner = None
            self.memory.clear()

    def _say(self, about: str, text: str) -> None:
        """Log it, once."""
        with self._saying:
            if about in self._said:
                return
            self._said.add(about)
        logger.log(self._log_level, "%s", text)


def _bytes_of(parts: Parts) -> int:
    return sum(part.numel() * part.itemsize for part in ([parts] if isinstance(parts, torch.Tensor) else parts))


def _copied(tensors: Mapping[str, Parts]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, contiguous, with no more memory than they need."""
    with torch.no_grad():
        return {name: _copy(parts) for name, parts in tensors.items()}


def _copy(parts: Parts) -> torch.Tensor:
    if isinstance(parts, torch.Tensor):
        return torch.empty(parts.shape, dtype=parts.dtype, device="cpu").copy_(parts)
    copies = torch.empty(len(parts), *parts[0].shape, dtype=parts[0].dtype, device="cpu")
    for copy, part in zip(copies, parts, strict=True):  # not stacked where they are: a device may have no memory for it
        copy.copy_(part)
    return copies
