"""How stored bytes become a weight: what every encoding can do. `quantization/` has the encodings themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Encoding(Protocol):
    """One form that weights are stored in. Equal ones decode alike; they are values, and print as their name."""

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Write the weight that `stored` holds to `out`, which has its shape, dtype and device.

        `stored` are the weight's components in the order of `TensorEntry.components`, in their own dtypes and shapes, on the
        device of `out`. What it allocates on the way is at most `WORK_BYTES`.
        """


WORK_BYTES = 16 * 2**20
"""Memory that a `decode` may take beside `stored` and `out`; plans count it."""
