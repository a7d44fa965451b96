"""The interface of encodings, which turn stored bytes into a weight. `quantization/` has the encodings themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

WORK_BYTES = 16 * 2**20
_WORK_SHARE = 8
"""An encoding may need several temporary values of up to four bytes for each decoded value of two."""


class Encoding(Protocol):
    """A storage format of weights. Encodings are values: equal ones decode alike, and print as their name."""

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor, work: torch.Tensor) -> None:
        """Write the weight that `stored` holds to `out`, which has its shape, dtype and device.

        `stored` are the weight's components in the order of `TensorEntry.components`, in their own dtypes and shapes, on the
        device of `out`. `work`, uint8 [`work_bytes(out.nbytes)`] or more on that device, is memory for temporaries: large ones
        that are allocated for every weight would take longer to map than to fill.
        """


def work_bytes(decoded_bytes: int) -> int:
    """What decoding a weight of `decoded_bytes` may use in addition to the weight; plans include it."""
    return min(WORK_BYTES, _WORK_SHARE * decoded_bytes)


def carve(work: torch.Tensor, *parts: tuple[torch.dtype, int]) -> list[torch.Tensor]:
    """A flat tensor of each dtype and length out of `work`, one behind another."""
    found, place = [], 0
    for dtype, count in parts:
        place += -place % dtype.itemsize
        found.append(work[place : place + count * dtype.itemsize].view(dtype))
        place += count * dtype.itemsize
    return found
