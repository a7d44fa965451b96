"""Eight-bit integers with one scale per row, made by this library: `compression="8bit"`, and the head of "4bit".

A value is `float32(integer) * float32(scale)`, rounded once to the model's dtype, in which the scales are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rabbit_engine.quantization import torch_products
from rabbit_engine.quantization.decoded_product import decoded_product
from rabbit_engine.quantization.storable import Component
from rabbit_engine.storage.encoding import Described

_LARGEST = 127
_MOST_AT_ONCE = 2**20
"""Values that are compressed together: what bounds the memory for temporaries."""

_MOST_ROWS = 16
"""Of states for which the fused product is faster than decoding followed by torch's product; see docs/benchmarks.md."""


@dataclass(frozen=True, slots=True)
class EightBitRows:
    """Components: `values` int8 [..., rows, columns], and `scales` [..., rows] in the dtype of the decoded weight."""

    form: ClassVar[str] = "int8_rows"
    roles: ClassVar[tuple[str, ...]] = ("values", "scales")
    by_rows: ClassVar[bool] = True
    fused_by_default: ClassVar[bool] = True

    def parameters(self) -> Mapping[str, int | str]:
        """None."""
        return {}

    def components(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Component]:
        """Raises ValueError for a weight that is not a matrix or a stack of matrices of a dtype that models run in."""
        if len(shape) < 2 or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"a weight of shape {list(shape)} and {dtype} is not a matrix of floats")
        return Component(torch.int8, shape), Component(dtype, shape[:-1])

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Exact in the dtype of `out`: it holds all integers of eight bits, and torch rounds a product once."""
        values, scales = stored
        out.copy_(values)
        out.mul_(scales[..., None])

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """None."""
        del stored, out, device
        return 0

    def compress(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """Round to nearest; the largest value of a row becomes 127. Raises ValueError for values that are not finite."""
        rows = weight.reshape(-1, weight.shape[-1])
        values = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        scales = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
        at_once = max(1, _MOST_AT_ONCE // rows.shape[1])
        for some, integers, factors in zip(rows.split(at_once), values.split(at_once), scales.split(at_once), strict=True):
            factors.copy_(some.abs().amax(dim=1).float() / _LARGEST)
            if not factors.isfinite().all():
                raise ValueError("it has values that are not finite")
            inverse = torch.where(factors != 0, 1 / factors.float(), 0)
            integers.copy_((some.float() * inverse[:, None]).round_().clamp_(-_LARGEST, _LARGEST))
        return values.view(weight.shape), scales.view(weight.shape[:-1])

    def gains(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether torch's fused product beats decoding for `rows` rows of states."""
        return rows <= _MOST_ROWS and torch_products.has_int8(dtype, device)

    def linear(self, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """`states` [rows, columns] times the weight transposed; integers are multiplied in float32, and scaled at the end."""
        values, scales = stored
        if scales.dtype != states.dtype or shape[1] % torch_products.INT8_COLUMNS:
            return decoded_product(self, states, stored, shape)
        return torch_products.int8_product(states, values.view(*shape), scales.view(shape[0]))
