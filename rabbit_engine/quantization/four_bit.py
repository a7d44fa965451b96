"""Four-bit integers with a scale and a zero for each group of a row, made by this library: `compression="4bit"`.

A value is `(code - 8) * scale + zero` in float32, a product and a sum, rounded once to the model's dtype. Scales and zeros are
stored in that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rabbit_engine.quantization import kernels, torch_products
from rabbit_engine.quantization.decoded_product import decoded_product
from rabbit_engine.quantization.four_bit_fit import fit_groups
from rabbit_engine.quantization.four_bit_layouts import BY_ROWS, LAYOUTS, native_layout, pack, regions, unpack
from rabbit_engine.quantization.storable import Component
from rabbit_engine.storage.encoding import Described, rows_at_once
from rabbit_engine.storage.jsonvalues import Fields, shown

_MIDDLE = 8
"""The code of a group's zero."""

MOST_COLUMNS = 2**16
"""Of a row: a block of 64 must fit the memory for temporaries."""

_MOST_AT_ONCE = 2**18
"""Values that are decoded together on a CPU: few enough for its caches, enough to seldom wake torch's threads."""

_COMPRESSED_AT_ONCE = 2**22
"""Values that are compressed together: what bounds the memory for temporaries."""

_BLOCK_ROWS = 64
"""Blocks of every layout divide this many rows."""

_MOST_ROWS = 48
"""Of states for which the fused product is faster than decoding followed by torch's product; see docs/benchmarks.md."""


@dataclass(frozen=True, slots=True)
class FourBitGroups:
    """Components: `codes` uint8 [..., rows, columns / 2] in the arrangement `layout`, and `factors` [..., columns / group,
    rows, 2], the scale and the zero of each group."""

    group: int
    layout: str

    form: ClassVar[str] = "int4_groups"
    roles: ClassVar[tuple[str, ...]] = ("codes", "factors")
    by_rows: ClassVar[bool] = False
    fused_by_default: ClassVar[bool] = True

    @classmethod
    def of(cls, parameters: Fields) -> FourBitGroups:
        """The encoding with stored parameters. Raises ValueError for unknown ones."""
        group, layout = parameters.count("group"), parameters.text("layout")
        if group not in torch_products.INT4_GROUPS or layout not in LAYOUTS:
            raise ValueError(f"groups of {group} in the layout {shown(layout)} are unknown; layouts are {', '.join(LAYOUTS)}")
        return cls(group, layout)

    def parameters(self) -> Mapping[str, int | str]:
        """The size of groups and the arrangement of codes."""
        return {"group": self.group, "layout": self.layout}

    def components(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Component]:
        """Raises ValueError for a weight that is not made of matrices of whole groups, or of rows that the layout cannot have."""
        if len(shape) < 2 or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"a weight of shape {list(shape)} and {dtype} is not a matrix of floats")
        *stack, rows, columns = shape
        rows_fit = self.layout == BY_ROWS or rows % torch_products.INT4_ROWS == 0
        if columns % self.group or columns > MOST_COLUMNS or not rows_fit:
            raise ValueError(f"{rows} rows of {columns} values have no groups of {self.group} in the layout {self.layout}")
        codes, factors = (*stack, rows, columns // 2), (*stack, columns // self.group, rows, 2)
        return Component(torch.uint8, codes), Component(_factor_dtype(dtype), factors)

    def compress(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """Codes, scales and zeros with nearly the smallest squared error. Raises ValueError for values that are not finite."""
        forms = self.components(weight.dtype, tuple(weight.shape))
        codes, factors = (torch.empty(form.shape, dtype=form.dtype, device=weight.device) for form in forms)
        for matrix, some_codes, some_factors in zip(_matrices(weight), _matrices(codes), _matrices(factors, 3), strict=True):
            self._compress(matrix, some_codes, some_factors)
        return codes, factors

    def _compress(self, matrix: torch.Tensor, codes: torch.Tensor, factors: torch.Tensor) -> None:
        rows, columns = matrix.shape
        step = max(1, _COMPRESSED_AT_ONCE // (columns * _BLOCK_ROWS)) * _BLOCK_ROWS
        for first in range(0, rows, step):
            some = matrix[first : first + step]
            found, scales, zeros = fit_groups(some.reshape(-1, self.group), factors.dtype)
            codes[first : first + step] = pack(found.view(some.shape), self.layout)
            of_rows = factors[:, first : first + step]
            of_rows[..., 0], of_rows[..., 1] = scales.view(len(some), -1).t(), zeros.view(len(some), -1).t()

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decode some blocks of rows at a time."""
        codes, factors = stored
        for matrix, some_codes, some_factors in zip(_matrices(out), _matrices(codes), _matrices(factors, 3), strict=True):
            if self.layout != BY_ROWS and kernels.can_write(matrix.dtype, matrix.device):
                self._decode_compiled(some_codes, some_factors, matrix)
            else:
                self._decode_with_torch(some_codes, some_factors, matrix)

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """A matrix's factors in float32, twice; with torch operations a piece: in float32, its codes, its factors."""
        rows, columns = out.shape[-2:]
        if self.layout != BY_ROWS and kernels.can_write(out.dtype, device):
            return 2 * 4 * math.prod(stored[1].shape[-3:])
        piece = min(rows, _rows_at_once(columns, device)) * columns
        return (4 + 1) * piece + 2 * 4 * piece // self.group

    def _decode_compiled(self, codes: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
        from rabbit_engine.quantization.kernels.four_bit import decode_blocks_of_rows

        scales, zeros = factors.float().permute(2, 1, 0).contiguous()
        bits = out.view(kernels.BITS[out.dtype])
        for region in regions(len(out), self.layout):
            rows = slice(region.first, region.stop)
            some, least = region.bytes_of(codes).flatten(-2), -(-kernels.THREAD_VALUES // (region.block * out.shape[1]))
            of_rows = [part[rows].numpy() for part in (scales, zeros)]
            arrays = (some.numpy(), region.distance, *of_rows, self.group, bits[rows].numpy())
            kernels.run_rows(decode_blocks_of_rows, len(some), *arrays, least=least)

    def _decode_with_torch(self, codes: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
        rows, columns = out.shape
        step = _rows_at_once(columns, out.device)
        memory = torch.empty(min(rows, step) * columns, dtype=torch.float32, device=out.device)
        for first in range(0, rows, step):
            some = out[first : first + step]
            values = memory[: some.numel()].view(some.shape)
            unpack(codes[first : first + step], self.layout, values)
            scales, zeros = factors[:, first : first + step].float().permute(2, 1, 0).unsqueeze(-1)
            values.view(len(some), -1, self.group).sub_(_MIDDLE).mul_(scales).add_(zeros)
            some.copy_(values)

    def gains(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether torch's fused product beats decoding for `rows` rows of states, and this layout is the machine's."""
        return rows <= _MOST_ROWS and torch_products.has_int4(dtype, device) and self.layout == native_layout()

    def linear(self, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """`states` [rows, columns] times the weight transposed, which is not rounded to the dtype of `states` first."""
        codes, factors = stored
        if factors.dtype != states.dtype or self.layout != native_layout():
            return decoded_product(self, states, stored, shape)
        rows, columns = shape
        return torch_products.int4_product(
            states, codes.view(rows, columns // 2), self.group, factors.view(columns // self.group, rows, 2)
        )


def _rows_at_once(columns: int, device: torch.device) -> int:
    return rows_at_once(_MOST_AT_ONCE, columns * _BLOCK_ROWS, device) * _BLOCK_ROWS


def _matrices(tensor: torch.Tensor, dimensions: int = 2) -> torch.Tensor:
    """The tensor with one dimension before the `dimensions` of a matrix."""
    return tensor.view(-1, *tensor.shape[-dimensions:])


def _factor_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize <= torch.float32.itemsize else torch.float32
