"""Rows that are stored in another order than the model's, as GGUF files store the rows of a llama's queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rabbit_engine.storage.encoding import Described, rows_at_once

_MOST_AT_ONCE = 2**20
"""Values that are gathered together on a CPU."""


class RowOrder:
    """An order of rows, a value: row r of the weight is stored as row `index[r]`, int64 [rows]."""

    def __init__(self, index: torch.Tensor) -> None:
        self.index = index
        self._on: dict[torch.device, torch.Tensor] = {index.device: index}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowOrder) and torch.equal(self.index, other.index)

    def __hash__(self) -> int:
        return hash(self.index.numpy().tobytes())

    def __repr__(self) -> str:
        return f"RowOrder({len(self.index)} rows)"

    def on(self, device: torch.device) -> torch.Tensor:
        """The index on a device; it stays there."""
        if device not in self._on:
            self._on[device] = self.index.to(device)
        return self._on[device]


@dataclass(frozen=True, slots=True)
class OrderedRows:
    """One component of the weight's shape, in any float: its rows in another order, rounded to the weight's dtype."""

    order: RowOrder

    by_rows = False

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Gather some rows at a time, then round them."""
        (values,) = stored
        width = values[0].numel()
        rows, target, index = values.view(-1, width), out.view(-1, width), self.order.on(out.device)
        at_once = rows_at_once(_MOST_AT_ONCE, width, out.device)
        for places, part in zip(index.split(at_once), target.split(at_once), strict=True):
            part.copy_(rows.index_select(0, places))

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """A piece, as it is stored."""
        width = math.prod(out.shape[1:])
        return stored[0].dtype.itemsize * min(math.prod(out.shape), rows_at_once(_MOST_AT_ONCE, width, device) * width)
