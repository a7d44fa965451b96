"""The keys and values of a text, layer by layer: whole while their layer runs, in blocks elsewhere until its next turn.

A layer's tokens lie in blocks of `block_tokens`, and the newest in a tail in memory, of one to two blocks: what is dropped,
chosen or reordered there moves nothing. When a layer's turn comes, its blocks are read to one buffer, the tail and the new
tokens are added, and the next layer's blocks are read ahead; when the next turn begins, new whole blocks are written behind.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TypeVar

from rabbit_engine.storage.scratchfile import ScratchFile
from rabbit_engine.streaming.caches.blocks import Pair, StoredBlock
from rabbit_engine.streaming.caches.buffers import BufferPool, LayerBuffer
from rabbit_engine.streaming.caches.encoded import EncodedBlock
from rabbit_engine.streaming.caches.layers import LayerStates
from rabbit_engine.streaming.caches.mover import BlockMover
from rabbit_engine.streaming.caches.pieces import LayerInPieces
from rabbit_engine.streaming.caches.windows import WindowStates
from rabbit_engine.streaming.transfer.reader import Reader, shared_reader

BLOCK_TOKENS = 256

PIECE_TOKENS = 2048
"""Of a layer that is not whole in memory: each piece costs some ten calls of torch."""

States = TypeVar("States", bound=LayerStates)


class BlockHome:
    """Where the blocks of a text lie, and of those forked from it: a file in `folder`, or memory if that is None; `encoded`
    in eight bits, or as they are. Layers show them whole, or in pieces of `piece_tokens`, which blocks divide, if that is set.
    """

    def __init__(
        self,
        folder: Path | None,
        block_tokens: int = BLOCK_TOKENS,
        reader: Reader | None = None,
        *,
        encoded: bool = False,
        piece_tokens: int | None = None,
    ) -> None:
        """Raises CacheStorageError if the folder cannot be written."""
        self.block_tokens, self.encoded, self.piece_tokens = block_tokens, encoded, piece_tokens
        self.pool = BufferPool()
        self.mover = BlockMover(None if folder is None else ScratchFile(folder), reader or shared_reader())
        weakref.finalize(self, self.mover.close).atexit = False
        self.mover.begin()  # not before: an interrupt would leave it among the reader's queues

    @property
    def file_bytes(self) -> int:
        """The size of the file."""
        return self.mover.file_bytes

    def close(self) -> None:
        """Free the file and the buffers. Idempotent."""
        self.pool.clear()
        self.mover.close()


class TextStates:
    """The layers of one text, or of several computed together. At most about `expected_tokens` will come; more may."""

    def __init__(self, home: BlockHome, expected_tokens: int = 0) -> None:
        self._home, self.expected_tokens = home, expected_tokens
        self.block_tokens = home.block_tokens
        self._layers: list[weakref.ref[LayerStates]] = []  # they refer to this: a cycle would keep files and buffers for a while
        self._current: weakref.ref[LayerStates] | None = None

    def fork(self) -> tuple[TextStates, dict[LayerStates, LayerStates]]:
        """A text that begins with the same tokens, in the same blocks, and for each layer its own."""
        text, layers = TextStates(self._home, self.expected_tokens), (found() for found in self._layers)
        return text, {layer: layer.fork(text._add(type(layer), layer.expected_tokens)) for layer in layers if layer is not None}

    def new_layer(self, expected_tokens: int | None = None) -> LayerStates:
        """The states of the next layer in the order of a pass. `expected_tokens` are its own, if they are not the text's."""
        return self._add(LayerStates if self._home.piece_tokens is None else LayerInPieces, expected_tokens)

    def new_window(self) -> WindowStates:
        """The states of the next layer, which forgets tokens: none beside those that it has are expected."""
        return self._add(WindowStates, 0)

    def _add(self, kind: type[States], expected_tokens: int | None) -> States:
        layer = kind(self, len(self._layers), expected_tokens)
        self._layers.append(weakref.ref(layer))
        return layer

    @property
    def bytes_read(self) -> int:
        """Bytes of blocks read from the file so far."""
        return self._home.mover.bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes of blocks written to the file so far."""
        return self._home.mover.bytes_written

    @property
    def file_bytes(self) -> int:
        """The size of the file, also of texts forked from it."""
        return self._home.file_bytes

    def close(self) -> None:
        """Free the file and the buffers, also those of texts that were forked from it. Idempotent."""
        self._current = None
        self._home.close()

    # For its layers.

    def begin_turn(self, layer: LayerStates) -> None:
        """`layer` is used now: no other is whole any more, and the next is read ahead."""
        if self._whole_layer() is layer:
            return
        self.end_turn_before(layer)
        layer.bring()
        self._current = weakref.ref(layer)
        self.read_ahead_after(layer)

    def read_ahead_after(self, layer: LayerStates) -> None:
        """Read ahead for the layer whose turn comes after that of `layer`."""
        following = self._layers[(layer.index + 1) % len(self._layers)]()
        if following is not None:
            following.read_ahead()

    def end_turn_before(self, layer: object) -> None:
        """End the turn of every layer but `layer`."""
        current = self._whole_layer()
        if current is not None and current is not layer:
            current.end_turn()
            self._current = None

    def end_turn_of(self, layer: LayerStates) -> None:
        """End the turn of `layer`, if it is whole."""
        if self._whole_layer() is layer:
            layer.end_turn()
            self._current = None

    def forget_turn_of(self, layer: LayerStates) -> None:
        """`layer` has dropped its buffer."""
        if self._whole_layer() is layer:
            self._current = None

    @property
    def piece_blocks(self) -> int:
        """How many blocks a piece has."""
        return (self._home.piece_tokens or 0) // self.block_tokens

    def _whole_layer(self) -> LayerStates | None:
        return None if self._current is None else self._current()

    def buffer_for(self, states: Pair, rows: int, tokens: int) -> LayerBuffer:
        """One for `tokens` tokens of the shape of `states`, and those up to a whole block."""
        return LayerBuffer.like(states, rows, -(-tokens // self.block_tokens) * self.block_tokens, self._home.pool)

    def cut(self, states: Pair) -> StoredBlock:
        """A block of the buffer of a layer: without a copy until it is written, unless encoded or on another device."""
        if self._home.encoded:
            return EncodedBlock(states, aligned=self.mover.has_file)
        is_shown = states[0].device.type == "cpu" and self.mover.has_file
        return StoredBlock(states) if is_shown else self.new_block(states)

    def small_buffer(self, states: Pair, tokens: int) -> LayerBuffer:
        """One for exactly `tokens` tokens of the shape of `states`."""
        return LayerBuffer.like(states, len(states[0]), tokens, self._home.pool)

    def new_block(self, states: Pair) -> StoredBlock:
        """A copy of a block's states, in whole pages."""
        if self._home.encoded:
            return EncodedBlock(states, aligned=self.mover.has_file)
        buffer = self.small_buffer((states[0].cpu(), states[1].cpu()), states[0].shape[2])
        buffer.add(states)
        return StoredBlock(buffer.view())

    @property
    def mover(self) -> BlockMover:
        """What moves their blocks."""
        return self._home.mover
