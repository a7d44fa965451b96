"""The interface of encodings, which turn stored bytes into a weight. `quantization/` has the encodings themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Encoding(Protocol):
    """A storage format of weights. Encodings are values: equal ones decode alike, and print as their name."""

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Write the weight that `stored` holds to `out`, which has its shape, dtype and device.

        `stored` are the weight's components in the order of `TensorEntry.components`, in their own dtypes and shapes, on the
        device of `out`. What it allocates on the way is at most `WORK_BYTES`.
        """


WORK_BYTES = 16 * 2**20
"""Bytes that a `decode` may allocate in addition to `stored` and `out`; plans include them."""
