"""The interface of encodings, which turn stored bytes into a weight. `quantization/` has the encodings themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

_ON_ACCELERATORS = 2**23
"""Values that an accelerator decodes together: with an eighth of them an H100 decoded Q4_K at a twelfth of the rate."""


class Described(Protocol):
    """A tensor, or the description of one."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of its values."""

    @property
    def shape(self) -> Sequence[int]:
        """Its lengths."""

    @property
    def nbytes(self) -> int:
        """Its size."""


class Encoding(Protocol):
    """A storage format of weights. Encodings are values: equal ones decode alike, and print as their name."""

    @property
    def by_rows(self) -> bool:
        """Whether every component holds the weight's rows in order along its own dimension 0, so that a range of rows is a
        range of each component."""

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Write the weight that `stored` holds to `out`, which has its shape, dtype and device.

        `stored` are the weight's components in the order of `TensorEntry.components`, in their own dtypes and shapes, on the
        device of `out`. A large weight is decoded in pieces, so that temporaries stay within `work_bytes`.
        Raises DamagedCheckpointError for values that mean nothing; the caller adds the file and the weight.
        """

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """The most bytes that torch allocates on `device` for `decode` to hold at once; plans include it.

        Not included are the few rows that a compiled kernel holds in each thread.
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


def values_at_once(most_on_cpu: int, device: torch.device) -> int:
    """How many values to decode together: on a CPU as many as its caches hold, on an accelerator many, because every launch of
    a kernel takes longer than a small kernel runs."""
    return most_on_cpu if device.type == "cpu" else _ON_ACCELERATORS


def rows_at_once(most_on_cpu: int, columns: int, device: torch.device) -> int:
    """How many whole rows that is, at least one."""
    return max(1, values_at_once(most_on_cpu, device) // columns)
