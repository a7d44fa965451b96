"""Moves blocks of keys and values between memory and a file, in the threads that read weights.

A layer that the model waits for comes first. Layers read ahead and blocks written behind take turns with the weights.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from rabbit_engine.errors import ModelClosedError
from rabbit_engine.storage.directio import CHUNK_BYTES, aligned_up, as_bytes
from rabbit_engine.storage.scratchfile import ScratchFile
from rabbit_engine.streaming.caches.blocks import Pair, StoredBlock, TextBlock, planes
from rabbit_engine.streaming.caches.buffers import LayerBuffer
from rabbit_engine.streaming.caches.encoded import EncodedBlock
from rabbit_engine.streaming.transfer.reader import Job, Reader


class Arrival:
    """The blocks of a layer on their way to `buffer`."""

    def __init__(self, blocks: tuple[TextBlock, ...], buffer: LayerBuffer) -> None:
        self.blocks, self.buffer = blocks, buffer
        self.parts = deque(_parts(blocks))
        self.under_way = 0
        self.error: Exception | None = None
        self._rows: tuple[int, ...] | None = None

    def take_rows(self, indices: Sequence[int]) -> None:
        """Bring the blocks with the rows at `indices`, as many as there are."""
        rows = tuple(indices)
        self.blocks = tuple(block.take(rows) for block in self.blocks)
        self._rows = rows if self._rows is None else tuple(self._rows[index] for index in rows)

    def settle(self) -> None:
        """What was read has its rows. Once all is there."""
        if self._rows is not None:
            self.buffer.take_rows(self._rows, self.tokens)
            self._rows = None

    @property
    def tokens(self) -> int:
        """How many tokens the blocks have."""
        return sum(block.stored.tokens for block in self.blocks)

    @property
    def is_done(self) -> bool:
        """Whether all are there, or one failed and none is under way."""
        return not self.under_way and (not self.parts or self.error is not None)


Part = list[tuple[int, TextBlock]]
"""Blocks that are read as one, each with the index of its first token."""


def _parts(blocks: Sequence[TextBlock]) -> list[Part]:
    """Of at most CHUNK_BYTES each, as they lie in the file, or of one block."""
    parts, first, room = list[Part](), 0, 0
    for block in blocks:
        if block.stored.nbytes > room:
            parts.append([])
            room = CHUNK_BYTES
        parts[-1].append((first, block))
        first, room = first + block.stored.tokens, room - block.stored.nbytes
    return parts


class BlockMover:
    """The blocks of one text, between memory and `file`; without a file they stay in memory. `close` ends it and the file.

    `bytes_read` and `bytes_written` count what moved.
    """

    def __init__(self, file: ScratchFile | None, reader: Reader) -> None:
        self._file, self._reader = file, reader
        self._arrivals: deque[Arrival] = deque()
        self._wanted: list[Arrival] = []
        self._writes: deque[tuple[StoredBlock, int]] = deque()
        self._waits_for_writes = False
        self._writing = 0
        self._write_error: Exception | None = None
        self._reading = 0
        self._scratch = threading.local()
        self._process = os.getpid()
        self._closed = self._ended = False
        self.bytes_read = self.bytes_written = 0

    def begin(self) -> None:
        """Have the reader threads work for it until `close`."""
        self._reader.join(self)

    # For the model's thread.

    def bring(self, arrival: Arrival) -> None:
        """Begin to read the blocks of `arrival`. Raises ModelClosedError, as the others do, once it is closed, and in a process
        that was forked from its own."""
        self._require_open()
        with self._reader.lock:
            self._arrivals.append(arrival)
            self._reader.changed.notify_all()

    def drop(self, arrival: Arrival) -> None:
        """Read no more of it; what is under way arrives in its buffer."""
        if self._is_forked:
            return
        with self._reader.lock:
            self._forget(arrival)

    def wait(self, arrival: Arrival) -> None:
        """Return when it is there. Raises what a read raised."""
        self._require_open()
        with self._reader.lock:
            self._wanted.append(arrival)
            self._reader.changed.notify_all()
            try:
                while not arrival.is_done:
                    self._wait()
            finally:
                self._wanted.remove(arrival)
            self._forget(arrival)
        if arrival.error is not None:
            raise arrival.error
        arrival.settle()

    def put_away(self, blocks: Sequence[StoredBlock], layer: int) -> None:
        """Write `blocks` of `layer` in the background, once those of the call before are written: so few wait in memory. Raises
        what a write raised."""
        if self._file is None or not blocks:
            return
        self._require_open()
        with self._reader.lock:
            self._waits_for_writes = True
            self._reader.changed.notify_all()
            try:
                while (self._writes or self._writing) and self._write_error is None:
                    self._wait()
            finally:
                self._waits_for_writes = False
            if self._write_error is not None:
                raise self._write_error
            self._writes.extend((stored, self._file.claim(stored.nbytes, layer)) for stored in blocks)
            self._reader.changed.notify_all()

    @property
    def has_file(self) -> bool:
        """Whether blocks are written to one."""
        return self._file is not None

    @property
    def file_bytes(self) -> int:
        """The size of the file."""
        return 0 if self._file is None else self._file.nbytes

    def close(self) -> None:
        """Stop, and free the file. Idempotent, also after an interrupt. From any thread, also for a finalizer amid the reader's
        own work."""
        if self._is_forked or self._ended:
            return
        if self._reader.is_busy_here():
            threading.Thread(target=self._close, name="rabbit-closer").start()
        else:
            self._close()

    def _close(self) -> None:
        with self._reader.lock:
            self._closed = True
            self._writes.clear()
            self._arrivals.clear()
            self._reader.changed.notify_all()
            while self._writing or self._reading:
                self._reader.changed.wait()
        self._reader.leave(self)
        if self._file is not None:
            self._file.close()
        self._ended = True

    @property
    def _is_forked(self) -> bool:
        """Whether this process was forked from its own: it has no reader, and locks may never be released."""
        return os.getpid() != self._process

    def _require_open(self) -> None:
        if self._closed or self._is_forked:
            raise ModelClosedError("the cache of this text was closed, or belongs to the process that this one was forked from")

    def _wait(self) -> None:
        self._require_open()
        self._reader.changed.wait()

    def _forget(self, arrival: Arrival) -> None:
        if arrival in self._arrivals:
            self._arrivals.remove(arrival)

    # For the reader threads, with the lock held.

    def next_job(self, *, wanted: bool) -> Job | None:
        """The next read of what is waited for, else of what was asked for first, else a write."""
        if self._closed:
            return None
        for arrival in self._wanted if wanted else [*self._wanted, *self._arrivals]:
            if arrival.parts and arrival.error is None:
                return self._issue(arrival)
        if self._writes and self._write_error is None and (self._waits_for_writes or not wanted):
            self._writing += 1
            return partial(self._write, *self._writes.popleft())
        return None

    def _issue(self, arrival: Arrival) -> Job:
        arrival.under_way += 1
        self._reading += 1
        return partial(self._read, arrival, arrival.parts.popleft())

    # In the reader threads, without the lock.

    def _read(self, arrival: Arrival, part: Part, lane: int) -> Any:
        del lane
        error, nbytes = None, 0
        try:
            nbytes = self._read_part(arrival.buffer, part)
        except Exception as caught:  # noqa: BLE001 - raised where the layer is waited for
            error = caught

        def done() -> None:
            arrival.under_way -= 1
            self._reading -= 1
            arrival.error = arrival.error or error
            self.bytes_read += nbytes

        return done

    def _read_part(self, buffer: LayerBuffer, part: Part) -> int:
        """Bring each block to its place: rows that lie one behind another, in one read. Returns the bytes read."""
        runs: list[tuple[int, list[memoryview]]] = []
        end = nbytes = 0
        for first, block in part:
            stored = block.stored
            here = [states[:, :, first : first + stored.tokens] for states in buffer.arriving]
            if isinstance(stored, EncodedBlock):
                nbytes += self._decode(stored, block.rows, (here[0], here[1]))
                continue
            states = stored.states
            for index, row in enumerate(block.rows):
                if states is not None:
                    for to, source in zip(here, states, strict=True):
                        _copy(to[index], source[row])
                    continue
                offset = stored.offset + row * stored.row_bytes
                found = [*planes(here[0], index), *planes(here[1], index)]
                if runs and offset == end:
                    runs[-1][1].extend(found)
                else:
                    runs.append((offset, found))
                end, nbytes = offset + stored.row_bytes, nbytes + stored.row_bytes
        for offset, buffers in runs:
            assert self._file is not None  # noqa: S101 - without one, all are in memory
            self._file.read(offset, buffers)
        return nbytes

    def _decode(self, stored: EncodedBlock, rows: Sequence[int], targets: Pair) -> int:
        """Bring a block in eight bits to its place. Returns the bytes read."""
        memory = stored.memory
        if memory is not None:
            stored.decode(memory, rows, targets)
            return 0
        assert self._file is not None  # noqa: S101 - without one, all are in memory
        memory = getattr(self._scratch, "memory", None)
        if memory is None or memory.nbytes < aligned_up(stored.nbytes):
            memory = self._scratch.memory = stored.new_memory()
        memory = memory[: aligned_up(stored.nbytes)]
        self._file.read(stored.offset, [as_bytes(memory)])
        stored.decode(memory, rows, targets)
        return stored.nbytes

    def _write(self, stored: StoredBlock, offset: int, lane: int) -> Any:
        del lane
        error = None
        try:
            self._write_block(stored, offset)
        except Exception as caught:  # noqa: BLE001 - raised where the next blocks are put away
            error = caught

        def done() -> None:
            self._writing -= 1
            self._write_error = self._write_error or error
            if error is None and self._file is not None:
                stored.put_away(self._file, offset)
                self.bytes_written += stored.nbytes

        return done

    def _write_block(self, stored: StoredBlock, offset: int) -> None:
        assert self._file is not None  # noqa: S101 - without one, nothing is written
        try:
            self._file.write(offset, stored.planes())
        except BaseException:
            self._file.give(offset, stored.nbytes)
            raise


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Within the CPU, head by head, with numpy: torch would start threads for every reader."""
    for to, from_ in zip(target.view(torch.uint8).numpy(), source.contiguous().view(torch.uint8).numpy(), strict=True):
        to[...] = from_
