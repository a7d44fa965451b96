"""The interface of encodings, which turn stored bytes into a weight. `quantization/` has the encodings themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

WORK_BYTES = 16 * 2**20
_WORK_SHARE = 8
"""An encoding may need several temporary values of up to four bytes for each decoded value of two."""


class Encoding(Protocol):
    """A storage format of weights. Encodings are values: equal ones decode alike, and print as their name."""

    @property
    def by_rows(self) -> bool:
        """Whether every component holds the weight's rows in order along its own dimension 0, so that a range of rows is a
        range of each component."""

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor, work: torch.Tensor) -> None:
        """Write the weight that `stored` holds to `out`, which has its shape, dtype and device.

        `stored` are the weight's components in the order of `TensorEntry.components`, in their own dtypes and shapes, on the
        device of `out`. `work`, uint8 [`work_bytes(out.nbytes)`] or more on that device, is memory for temporaries: large ones
        that are allocated for every weight would take longer to map than to fill.
        """


@runtime_checkable
class Product(Protocol):
    """What an encoding has in addition if it can multiply by a weight without decoding it.

    The result may differ from that of the decoded weight by rounding.
    """

    @property
    def fused_by_default(self) -> bool:
        """Whether `linear` is used unless the caller asks for decoded weights: nothing defines other bits for this format."""

    def gains(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether `linear` with `rows` rows of states in `dtype` works on `device`, and takes less time than decoding."""

    def linear(self, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """`states` [rows, columns] times the transposed weight of `shape` [outputs, columns]: [rows, outputs], in their dtype.

        `stored` as in `Encoding.decode`.
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


def values_at_once(most: int, most_on_cpu: int, device: torch.device) -> int:
    """How many values to decode together, of the `most` that there is memory for: on a CPU as many as its caches hold, on an
    accelerator all of them, because every launch of a kernel takes longer than a small kernel runs."""
    return min(most, most_on_cpu) if device.type == "cpu" else most
