"""Small weights that a reader of GGUF computes from stored values: norms less 1, logarithms, rotations of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rabbit_engine.storage.encoding import Encoding


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

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor, work: torch.Tensor) -> None:
        """Compute on the CPU, where the reader computes."""
        source = stored[0].cpu()
        if self.blocks is None:
            values = source.view(self.shape).to(self.dtype)
        else:
            values = torch.empty(self.shape, dtype=self.dtype, device="cpu")
            self.blocks.decode([source], values, work if work.device.type == "cpu" else work[:0].cpu())
        out.copy_(self.function(values).to(self.rounded).view(out.shape))
