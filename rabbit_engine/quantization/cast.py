"""A weight stored in another floating-point dtype than the model's, as in the unquantised part of a quantised checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, slots=True)
class Cast:
    """One component of the weight's shape, rounded to its dtype."""

    by_rows: ClassVar[bool] = True

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor, work: torch.Tensor) -> None:
        """Round to nearest, as `Tensor.to` does."""
        del work
        out.copy_(stored[0])
