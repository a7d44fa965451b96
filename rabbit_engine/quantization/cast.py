"""A weight stored in another floating-point dtype than the model's, as in the unquantised part of a quantised checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rabbit_engine.storage.encoding import Described


@dataclass(frozen=True, slots=True)
class Cast:
    """One component of the weight's shape, rounded to its dtype."""

    by_rows: ClassVar[bool] = True

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Round to nearest, as `Tensor.to` does."""
        out.copy_(stored[0])

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """None."""
        del stored, out, device
        return 0
