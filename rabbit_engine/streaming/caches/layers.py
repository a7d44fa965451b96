"""The keys and values of one layer of a text: a row of blocks, a tail in memory, and one buffer while the layer runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rabbit_engine.streaming.caches.blocks import Pair, TextBlock
from rabbit_engine.streaming.caches.buffers import LayerBuffer
from rabbit_engine.streaming.caches.mover import Arrival

if TYPE_CHECKING:
    from rabbit_engine.streaming.caches.states import TextStates

Saved = tuple[tuple[TextBlock, ...], Pair | None, int]
"""Blocks, a tail, and how many of the first tokens of both are hidden."""


class LayerStates:
    """Keys [rows, heads, tokens, width] and values [rows, heads, tokens, value width] of the tokens of a layer so far."""

    def __init__(self, text: TextStates, index: int, expected_tokens: int | None = None) -> None:
        self._text, self.index, self.expected_tokens = text, index, expected_tokens
        self._blocks: tuple[TextBlock, ...] = ()
        self._tail: Pair | None = None
        self._whole: LayerBuffer | None = None
        self._ahead: Arrival | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever added: even shapes are unknown."""
        return self._tail is None and self._whole is None

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        if self._whole is not None:
            return self._whole.tokens
        return self._stored_tokens + (0 if self._tail is None else self._tail[0].shape[2])

    @property
    def _stored_tokens(self) -> int:
        return len(self._blocks) * self._text.block_tokens

    # Growing, and what it shows.

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """Add tokens; all tokens so far, which stay as they are while anyone holds them."""
        if self.is_empty:
            self._tail = (keys[:, :, :0], values[:, :, :0])
        self._text.begin_turn(self)
        whole = self._require_room(self._buffer(), keys.shape[2])
        whole.add((keys, values))
        return whole.view()

    def all(self) -> Pair:
        """All tokens. Not before the first were added."""
        self._text.begin_turn(self)
        return self._buffer().view()

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens without a turn of the layer: for tokens that were computed earlier."""
        self._text.end_turn_of(self)
        self._drop_ahead()
        self._grow(keys, values)

    def _grow(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens to the tail, and put new whole blocks away."""
        tail = self._tail if self._tail is not None else (keys[:, :, :0], values[:, :, :0])
        tail = (torch.cat((tail[0], keys), dim=2), torch.cat((tail[1], values), dim=2))
        size, rows = self._text.block_tokens, tuple(range(len(keys)))
        count, blocks = max(0, tail[0].shape[2] // size - 1), self._blocks
        if count:
            cuts = (slice(at * size, (at + 1) * size) for at in range(count))
            fresh = [self._text.new_block((tail[0][:, :, cut], tail[1][:, :, cut])) for cut in cuts]
            self._text.mover.put_away(fresh, self.index)
            blocks = (*blocks, *(TextBlock(stored, rows) for stored in fresh))
            tail = (tail[0][:, :, count * size :].clone(), tail[1][:, :, count * size :].clone())
        self._blocks, self._tail = blocks, tail

    def part(self, first: int, stop: int) -> Pair:
        """Tokens `first` to `stop`, without a turn of the layer."""
        if self._whole is not None:
            return self._whole.view(first, stop)
        assert self._tail is not None  # noqa: S101 - it is not empty, and not whole
        size, stored = self._text.block_tokens, self._stored_tokens
        begin = min(first // size, len(self._blocks))
        blocks = self._blocks[begin : -(-stop // size)]
        arrival = Arrival(blocks, self._text.small_buffer(self._tail, len(blocks) * size + self._tail[0].shape[2]))
        if blocks:
            self._text.mover.bring(arrival)
            self._text.mover.wait(arrival)
        arrival.buffer.arrived(arrival.tokens)
        if stop > stored:
            arrival.buffer.add(self._tail)
        return arrival.buffer.view(first - begin * size, stop - begin * size)

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Have these tokens instead of all that it had."""
        self.clear()
        self._tail = (keys, values)

    def clear(self) -> None:
        """Have none, of no shape."""
        self._text.forget_turn_of(self)
        self._drop_ahead()
        self._blocks, self._tail, self._whole = (), None, None

    # Fewer tokens, other rows.

    def drop_last(self, count: int) -> None:
        """Drop the newest `count` tokens."""
        self.choose(max(0, self.tokens - count), ())

    def choose(self, kept: int, offsets: Sequence[int]) -> None:
        """Keep the first `kept` tokens, and of those behind them the ones at `offsets`, ascending."""
        if self.is_empty:
            return
        if self._whole is not None:
            self._blocks = self._blocks[: min(kept, self._stored_tokens) // self._text.block_tokens]
            _choose(self._whole.view(), kept, offsets)
            self._whole.tokens = kept + len(offsets)
            return
        first = self._uncover(kept, offsets)
        assert self._tail is not None  # noqa: S101 - it is not empty, and not whole
        self._tail = _choose(self._tail, kept - first, offsets)

    def _uncover(self, kept: int, offsets: Sequence[int]) -> int:
        """Have the tokens that are kept in the tail from the last block that is not whole any more. Returns its first token."""
        size = self._text.block_tokens
        if kept < self._stored_tokens:
            first, stop = kept // size * size, kept + (offsets[-1] + 1 if offsets else 0)
            keys, values = LayerStates.part(self, first, stop)  # counted from the first block, also where tokens are hidden
            self._drop_ahead()
            self._blocks, self._tail = self._blocks[: kept // size], (keys.clone(), values.clone())
        return self._stored_tokens

    def take_rows(self, indices: Sequence[int]) -> None:
        """Have the rows at `indices`, which may repeat, in their order."""
        if self.is_empty:
            return
        self._text.end_turn_of(self)
        assert self._tail is not None  # noqa: S101 - it is not empty, and not whole
        self._take_rows_ahead(indices)
        chosen = torch.tensor(list(indices), device=self._tail[0].device)
        self._tail = (self._tail[0].index_select(0, chosen), self._tail[1].index_select(0, chosen))
        self._blocks = tuple(block.take(tuple(indices)) for block in self._blocks)

    def _take_rows_ahead(self, indices: Sequence[int]) -> None:
        """Use what is read ahead, as beams do that go on: it is read with the rows that it had. Other counts are read again."""
        ahead = self._ahead
        if ahead is not None and len(indices) == self.rows and ahead.blocks == self._blocks[: len(ahead.blocks)]:
            ahead.take_rows(indices)

    def fork(self, other: LayerStates) -> LayerStates:
        """Let `other`, a new layer, have the same tokens; returns it."""
        if not self.is_empty:
            self._text.end_turn_of(self)
            assert self._tail is not None  # noqa: S101 - it is not empty, and not whole
            other._blocks, other._tail = self._blocks, (self._tail[0].clone(), self._tail[1].clone())
        return other

    def saved(self) -> Saved:
        """What `restore` needs."""
        self._text.end_turn_of(self)
        return self._blocks, self._tail, 0

    def restore(self, saved: Saved) -> None:
        """Have the tokens that it had when they were `saved`, fewer or more than now; once."""
        self._text.forget_turn_of(self)
        self._blocks, self._tail, _ = saved
        self._whole = None

    @property
    def rows(self) -> int:
        """How many texts are computed together."""
        states = self._tail if self._tail is not None else self._buffer().view()
        return int(states[0].shape[0])

    # Its turn.

    def bring(self) -> None:
        """Be whole: read what was not read ahead."""
        if self._whole is not None:  # an interrupt struck after that
            return
        arrival = self._ahead if self._ahead is not None and self._ahead.blocks == self._blocks else None
        if arrival is None:
            self._drop_ahead()
            arrival = self._begin_reading()
        self._ahead = None
        tail = self._tail
        assert tail is not None  # noqa: S101 - it is not empty
        if arrival.blocks:
            self._text.mover.wait(arrival)
        arrival.buffer.arrived(arrival.tokens)
        whole = self._require_room(arrival.buffer, tail[0].shape[2])
        whole.add(tail)
        self._whole, self._tail = whole, None

    def read_ahead(self) -> None:
        """Begin to read its blocks, unless that was begun."""
        if self._blocks and self._whole is None and self._ahead is None:
            self._ahead = self._begin_reading()

    def end_turn(self) -> None:
        """Keep a tail, and put new whole blocks away."""
        if self._whole is None:  # an interrupt struck after that
            return
        whole, size = self._whole, self._text.block_tokens
        count = max(len(self._blocks), whole.tokens // size - 1)
        fresh = [self._text.cut(whole.view(at * size, (at + 1) * size)) for at in range(len(self._blocks), count)]
        self._text.mover.put_away(fresh, self.index)
        keys, values = whole.view(count * size)
        rows = tuple(range(len(keys)))
        self._blocks = (*self._blocks, *(TextBlock(stored, rows) for stored in fresh))
        self._tail, self._whole = (keys.clone(), values.clone()), None

    def _begin_reading(self) -> Arrival:
        assert self._tail is not None  # noqa: S101 - it is not empty, and not whole
        tokens = self._stored_tokens + self._tail[0].shape[2] + self._text.block_tokens
        arrival = Arrival(self._blocks, self._new_buffer(self._tail, tokens))
        if arrival.blocks:
            self._text.mover.bring(arrival)
        return arrival

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._text.mover.drop(self._ahead)
            self._ahead = None

    def _buffer(self) -> LayerBuffer:
        assert self._whole is not None  # noqa: S101 - its turn has begun
        return self._whole

    def _new_buffer(self, states: Pair, tokens: int) -> LayerBuffer:
        """One for `tokens` tokens of the shape of `states`, and those that are expected."""
        expected = self._text.expected_tokens if self.expected_tokens is None else self.expected_tokens
        return self._text.buffer_for(states, len(states[0]), max(tokens, expected))

    def _require_room(self, buffer: LayerBuffer, tokens: int) -> LayerBuffer:
        """`buffer`, or a larger one with the same tokens, with room for `tokens` more."""
        if buffer.tokens + tokens <= buffer.capacity:
            return buffer
        states = buffer.view()
        larger = self._new_buffer(states, (buffer.tokens + tokens) * 9 // 8)
        larger.add(states)
        if buffer is self._whole:
            self._whole = larger
        return larger


def _choose(states: Pair, first: int, offsets: Sequence[int]) -> Pair:
    """`states` up to token `first`, with those at `offsets` from there moved to it, in place."""
    if list(offsets) != list(range(len(offsets))):
        chosen = torch.tensor(list(offsets), device=states[0].device) + first
        for tensor in states:
            tensor[:, :, first : first + len(offsets)] = tensor.index_select(2, chosen)
    stop = first + len(offsets)
    return states[0][:, :, :stop], states[1][:, :, :stop]
