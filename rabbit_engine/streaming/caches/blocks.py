"""Blocks of a layer's keys and values: immutable once made, so that several texts may hold the same one."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from rabbit_engine.storage.scratchfile import ScratchFile

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys [rows, heads, tokens, width] and values [rows, heads, tokens, value width]."""


class StoredBlock:
    """Keys and values of consecutive tokens: in memory until `put_away`, then in a file, whose extent is given back with the
    last reference to the block.

    In the file, a row's keys, head by head, come before its values, and one row lies behind another.
    """

    states: Pair | None = None

    def __init__(self, states: Pair) -> None:
        self.states = states
        keys, values = states
        self.tokens = keys.shape[2]
        self.row_bytes = (keys[0].numel() + values[0].numel()) * keys.element_size()
        self.nbytes = len(keys) * self.row_bytes
        self.offset = -1

    def planes(self) -> list[memoryview]:
        """What is written to the file."""
        assert self.states is not None  # noqa: S101 - it is written once
        return [plane for row in range(len(self.states[0])) for of in self.states for plane in planes(of, row)]

    def put_away(self, file: ScratchFile, offset: int) -> None:
        """It lies at `offset` of `file` now."""
        self.offset = offset
        weakref.finalize(self, file.give, offset, self.nbytes).atexit = False
        self.states = None


@dataclass(frozen=True, slots=True)
class TextBlock:
    """A stored block as a text sees it: its row `index` is row `rows[index]` of what is stored."""

    stored: StoredBlock
    rows: tuple[int, ...]

    def take(self, indices: tuple[int, ...]) -> TextBlock:
        """With the rows at `indices`, which may repeat."""
        return TextBlock(self.stored, tuple(self.rows[index] for index in indices))


def planes(states: torch.Tensor, row: int) -> list[memoryview]:
    """The bytes of each head of a row of `states` [rows, heads, tokens, width] on the CPU, whose heads are contiguous."""
    flat = states[row].view(torch.uint8)
    return [memoryview(head.numpy()).cast("B") for head in flat if head.numel()]
