"""Decoded rows whose columns are put in another order, or that become columns, as GPT-2 has its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rabbit_engine.quantization.gguf.order import RowOrder
from rabbit_engine.storage.encoding import Described, Encoding, rows_at_once

_MOST_AT_ONCE = 2**20
"""Values that are arranged together on a CPU."""


@dataclass(frozen=True, slots=True)
class ArrangedColumns:
    """One component, a matrix that `rows` decodes by rows. Column c of the weight is its column `order[c]`, if there is an order;
    a `transposed` weight has its rows as columns."""

    rows: Encoding
    order: RowOrder | None = None
    transposed: bool = False

    by_rows: ClassVar[bool] = False

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decode some rows at a time, then copy them to their place."""
        (source,) = stored
        target = out.view(-1, len(source)).t() if self.transposed else out.view(len(source), -1)
        at_once = rows_at_once(_MOST_AT_ONCE, target.shape[1], out.device)
        for some, part in zip(source.split(at_once), target.split(at_once), strict=True):
            values = torch.empty(part.shape, dtype=out.dtype, device=out.device)
            self.rows.decode([some], values)
            part.copy_(values if self.order is None else values.index_select(1, self.order.on(out.device)))

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """A piece, and once more in the order of its columns, or what `rows` needs."""
        count = math.prod(out.shape)
        width = count // stored[0].shape[0]
        piece = out.dtype.itemsize * min(count, rows_at_once(_MOST_AT_ONCE, width, device) * width)
        return piece + max(0 if self.order is None else piece, self.rows.work_bytes(stored, out, device))
