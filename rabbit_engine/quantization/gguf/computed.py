"""Small weights that a reader of GGUF computes from stored values: norms less 1, logarithms, rotations of a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rabbit_engine.storage.encoding import Described, Encoding

_COPIES = 4
"""Of the values that a function holds at once."""


@dataclass(frozen=True, slots=True)
class ComputedValues:
    """One component, in blocks that `blocks` decodes to `dtype`, or plain values, which are `dtype` before `function` sees them.

    The results are rounded to `rounded`, then to the weight's dtype. Temporaries are allocated: it is for small weights.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    rounded: torch.dtype
    blocks: Encoding | None = None

    by_rows: ClassVar[bool] = False

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Compute on the CPU, where the reader computes."""
        source = stored[0].cpu()
        if self.blocks is None:
            values = source.view(self.shape).to(self.dtype)
        else:
            values = torch.empty(self.shape, dtype=self.dtype, device="cpu")
            self.blocks.decode([source], values)
        out.copy_(self.function(values).to(self.rounded).view(out.shape))

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """Copies of the values in the function, or one and what decoding them needs."""
        del device
        blocks = 0 if self.blocks is None else self.blocks.work_bytes(stored, out, torch.device("cpu"))
        copy = self.dtype.itemsize * math.prod(self.shape)
        return max(_COPIES * copy, copy + blocks)
