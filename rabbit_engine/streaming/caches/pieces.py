"""Layers that are never whole in memory: attention goes through their blocks, a piece of them at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from rabbit_engine.caches import with_far_blocks
from rabbit_engine.streaming.caches.blocks import Pair, TextBlock
from rabbit_engine.streaming.caches.layers import LayerStates
from rabbit_engine.streaming.caches.mover import Arrival


class LayerInPieces(LayerStates):
    """Shows its blocks as FarStates, of which the tail is near; `all` still brings it whole."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """Add tokens; all tokens so far, for attention over blocks, while no other tokens are added."""
        self._text.end_turn_before(self)
        self._text.end_turn_of(self)  # that of `all`
        self._grow(keys, values)
        near = self._tail
        assert near is not None  # noqa: S101 - it has tokens
        if not self._blocks:
            self._text.read_ahead_after(self)
            return near
        return with_far_blocks(*near, LayerPieces(self, self._blocks, near))

    def read_ahead(self) -> None:
        """Begin to read its first piece, unless that was begun."""
        if self._blocks and self._whole is None and self._ahead is None and self._tail is not None:
            self._ahead = self._begin_piece(self._pieces_of(self._blocks)[0], self._tail)

    def pieces(self, blocks: tuple[TextBlock, ...], like: Pair) -> Iterator[Pair]:
        """The states of `blocks`, on the device of `like`, one piece in use and the next on its way; then the next layer's."""
        first, *others = self._pieces_of(blocks)
        coming = deque([self._first(first, like)])
        try:
            for following in (*others, ()):
                if following:
                    coming.append(self._begin_piece(following, like))
                else:
                    self._text.read_ahead_after(self)
                self._text.mover.wait(coming[0])
                coming[0].buffer.arrived(coming[0].tokens)
                yield coming.popleft().buffer.view()
        finally:
            for arrival in coming:
                self._text.mover.drop(arrival)

    def _pieces_of(self, blocks: tuple[TextBlock, ...]) -> list[tuple[TextBlock, ...]]:
        count = self._text.piece_blocks
        return [blocks[first : first + count] for first in range(0, len(blocks), count)]

    def _first(self, blocks: tuple[TextBlock, ...], like: Pair) -> Arrival:
        """What was read ahead, if it is that."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.blocks == blocks:
            return ahead
        if ahead is not None:
            self._text.mover.drop(ahead)
        return self._begin_piece(blocks, like)

    def _begin_piece(self, blocks: tuple[TextBlock, ...], like: Pair) -> Arrival:
        buffer = self._text.small_buffer(like, self._text.piece_blocks * self._text.block_tokens)
        arrival = Arrival(blocks, buffer)
        self._text.mover.bring(arrival)
        return arrival


class LayerPieces:
    """The blocks that a layer had when it showed them, for attention."""

    def __init__(self, layer: LayerInPieces, blocks: tuple[TextBlock, ...], like: Pair) -> None:
        self._layer, self._blocks, self._like = layer, blocks, like
        self.tokens = sum(block.stored.tokens for block in blocks)

    def blocks(self) -> Iterator[Pair]:
        """Keys and values of a piece at a time, from the first token to the last; see FarBlocks."""
        return self._layer.pieces(self._blocks, self._like)
