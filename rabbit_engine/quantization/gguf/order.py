"""Rows that are stored in another order than the model's, as GGUF files store the rows of a llama's queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rabbit_engine.storage.encoding import carve


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

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor, work: torch.Tensor) -> None:
        """Gather as many rows at a time as `work` has place for, then round them."""
        (values,) = stored
        width = values[0].numel()
        rows, target, index = values.view(-1, width), out.view(-1, width), self.order.on(out.device)
        at_once = max(1, work.nbytes // (width * values.itemsize))
        for places, part in zip(index.split(at_once), target.split(at_once), strict=True):
            (memory,) = carve(work, (values.dtype, part.numel()))
            part.copy_(torch.index_select(rows, 0, places, out=memory.view(part.shape)))
