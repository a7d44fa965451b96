"""Decoded rows whose columns are put in another order, or that become columns, as GPT-2 has its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rabbit_engine.quantization.gguf.order import RowOrder
from rabbit_engine.storage.encoding import Encoding, carve


@dataclass(frozen=True, slots=True)
class ArrangedColumns:
    """One component, a matrix that `rows` decodes by rows. Column c of the weight is its column `order[c]`, if there is an order;
    a `transposed` weight has its rows as columns."""

    rows: Encoding
    order: RowOrder | None = None
    transposed: bool = False

    by_rows: ClassVar[bool] = False

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor, work: torch.Tensor) -> None:
        """Decode some rows at a time to the first half of `work`, then copy them to their place."""
        (source,) = stored
        target = out.view(-1, len(source)).t() if self.transposed else out.view(len(source), -1)
        width, half = target.shape[1], work.nbytes // 2
        at_once = max(1, half // (width * out.dtype.itemsize))
        for some, part in zip(source.split(at_once), target.split(at_once), strict=True):
            values = carve(work, (out.dtype, part.numel()))[0].view(part.shape)
            self.rows.decode([some], values, work[half:])
            part.copy_(values if self.order is None else values.index_select(1, self.order.on(out.device)))
