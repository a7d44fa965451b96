"""The keys and values of one layer that sees a window of its text: what lies before it is forgotten, a block at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rabbit_engine.streaming.caches.blocks import Pair
from rabbit_engine.streaming.caches.buffers import LayerBuffer
from rabbit_engine.streaming.caches.layers import LayerStates, Saved

if TYPE_CHECKING:
    from rabbit_engine.streaming.caches.states import TextStates


class WindowStates(LayerStates):
    """The states of a layer, of which the first tokens can be forgotten.

    Those of a block that has others left are hidden. The other methods know nothing of them.
    """

    def __init__(self, text: TextStates, index: int, expected_tokens: int | None = 0) -> None:
        super().__init__(text, index, expected_tokens)
        self._hidden = 0

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return super().tokens - self._hidden

    def forget(self, count: int) -> None:
        """Forget the first `count` tokens. What was shown stays as it is."""
        self._hidden += count

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """Add tokens; all that are not forgotten, which stay as they are while anyone holds them."""
        return self._without_hidden(super().append(keys, values))

    def all(self) -> Pair:
        """All tokens that are not forgotten. Not before the first were added."""
        return self._without_hidden(super().all())

    def part(self, first: int, stop: int) -> Pair:
        """Tokens `first` to `stop` of those that are not forgotten, without a turn of the layer."""
        return super().part(first + self._hidden, stop + self._hidden)

    def clear(self) -> None:
        """Have none, of no shape."""
        super().clear()
        self._hidden = 0

    def choose(self, kept: int, offsets: Sequence[int]) -> None:
        """Keep the first `kept` tokens, and of those behind them the ones at `offsets`, ascending."""
        super().choose(kept + self._hidden, offsets)

    def fork(self, other: LayerStates) -> LayerStates:
        """Let `other`, a new layer, have the same tokens; returns it."""
        assert isinstance(other, WindowStates)  # noqa: S101 - the text makes it of the same class
        super().fork(other)
        other._hidden = self._hidden
        return other

    def saved(self) -> Saved:
        """What `restore` needs."""
        blocks, tail, _ = super().saved()
        return blocks, tail, self._hidden

    def restore(self, saved: Saved) -> None:
        """Have the tokens that it had when they were `saved`, fewer or more than now; once."""
        super().restore(saved)
        self._hidden = saved[2]

    def end_turn(self) -> None:
        """Keep a tail, and put new whole blocks away, but for those that are forgotten."""
        if self._whole is not None:
            self._drop_hidden()
        super().end_turn()

    def _require_room(self, buffer: LayerBuffer, tokens: int) -> LayerBuffer:
        if buffer is self._whole and buffer.tokens + tokens > buffer.capacity:
            buffer = self._drop_hidden()
        return super()._require_room(buffer, tokens)

    def _drop_hidden(self) -> LayerBuffer:
        """Forget whole blocks that are hidden, stored or not; returns what is whole now."""
        size = self._text.block_tokens
        count = self._hidden // size
        rest, hidden = self._buffer().without_first(count * size), self._hidden - count * size
        self._whole, self._blocks, self._hidden = rest, self._blocks[count:], hidden  # at once, for interrupts
        return rest

    def _without_hidden(self, states: Pair) -> Pair:
        keys, values = states
        return keys[:, :, self._hidden :], values[:, :, self._hidden :]
