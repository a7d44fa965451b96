"""Four-bit integers with a scale and a zero for each group of a row, made by this library: `compression="4bit"`.

A value is `(code - 8) * scale + zero` in float32, a product and a sum, rounded once to the model's dtype. Scales and zeros are
stored in that dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray

from rabbit_engine.quantization import kernels, torch_products
from rabbit_engine.quantization.decoded_product import decoded_product
from rabbit_engine.quantization.four_bit_fit import fit_groups
from rabbit_engine.quantization.four_bit_layouts import (
    BY_ROWS,
    LAYOUTS,
    STRIP_ROWS,
    STRIPS,
    can_multiply,
    factor_shape,
    factors_of_rows,
    pack,
    regions,
    unpack,
)
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

_PRODUCTS_OF_A_THREAD = 2**20
"""Products of a state and a code that are worth a thread: they take some 20 microseconds."""

_STATES_AT_ONCE = 256
"""Rows of states that are multiplied by strips together."""

_MOST_ROWS_OF_TORCH = 48
"""Of states for which torch's fused product is faster than decoding followed by its usual one; see docs/benchmarks.md."""


@dataclass(frozen=True, slots=True)
class FourBitGroups:
    """Components: `codes` uint8 [..., rows, columns / 2] in the arrangement `layout`, and `factors`, the scale and the zero of
    each group, [..., columns / group, rows, 2] or in strips [..., rows / 16, columns / group, 16, 2]."""

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
        rows_fit = self.layout == BY_ROWS or rows % STRIP_ROWS == 0
        if columns % self.group or columns > MOST_COLUMNS or not rows_fit:
            raise ValueError(f"{rows} rows of {columns} values have no groups of {self.group} in the layout {self.layout}")
        factors = (*stack, *factor_shape(rows, columns // self.group, self.layout))
        return Component(torch.uint8, (*stack, rows, columns // 2)), Component(_factor_dtype(dtype), factors)

    def compress(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """Codes, scales and zeros with nearly the smallest squared error. Raises ValueError for values that are not finite."""
        forms = self.components(weight.dtype, tuple(weight.shape))
        codes, factors = (torch.empty(form.shape, dtype=form.dtype, device=weight.device) for form in forms)
        for matrix, some_codes, some_factors in self._matrices(weight, codes, factors):
            self._compress(matrix, some_codes, some_factors)
        return codes, factors

    def _compress(self, matrix: torch.Tensor, codes: torch.Tensor, factors: torch.Tensor) -> None:
        rows, columns = matrix.shape
        step = max(1, _COMPRESSED_AT_ONCE // (columns * _BLOCK_ROWS)) * _BLOCK_ROWS
        for first in range(0, rows, step):
            some = matrix[first : first + step]
            found, scales, zeros = fit_groups(some.reshape(-1, self.group), factors.dtype)
            codes[first : first + step] = pack(found.view(some.shape), self.layout)
            of_rows = factors_of_rows(factors, first, first + len(some))
            of_rows[..., 0], of_rows[..., 1] = scales.view(of_rows.shape[:-1]), zeros.view(of_rows.shape[:-1])

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decode some blocks of rows at a time."""
        codes, factors = stored
        for matrix, some_codes, some_factors in self._matrices(out, codes, factors):
            if self.layout != BY_ROWS and kernels.can_write(matrix.dtype, matrix.device):
                self._decode_compiled(some_codes, some_factors, matrix)
            else:
                self._decode_with_torch(some_codes, some_factors, matrix)

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """A matrix's factors in float32, twice; with torch operations a piece: in float32, its codes, its factors twice."""
        del stored
        rows, columns = out.shape[-2:]
        if self.layout != BY_ROWS and kernels.can_write(out.dtype, device):
            return 2 * 4 * 2 * rows * columns // self.group
        piece = min(rows, _rows_at_once(columns, device)) * columns
        return (4 + 1) * piece + 2 * (2 + 4) * piece // self.group

    def _decode_compiled(self, codes: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
        from rabbit_engine.quantization.kernels.four_bit import decode_blocks_of_rows, decode_strips

        rows, columns = out.shape
        scales, zeros = factors_of_rows(factors, 0, rows).float().reshape(rows, -1, 2).permute(2, 0, 1).contiguous()
        bits = out.view(kernels.BITS[out.dtype])
        if self.layout == STRIPS:
            strips = codes.view(-1, columns // 8, STRIP_ROWS, 4)
            arrays = (part.numpy() for part in (strips, scales, zeros, bits))
            kernels.run_rows(decode_strips, len(strips), *arrays, self.group, least=_worth_a_thread(STRIP_ROWS * columns))
            return
        for region in regions(rows, self.layout):
            some = region.bytes_of(codes).flatten(-2)
            arrays = (part[region.first : region.stop].numpy() for part in (scales, zeros, bits))
            least = _worth_a_thread(region.block * columns)
            kernels.run_rows(decode_blocks_of_rows, len(some), some.numpy(), *arrays, self.group, region.distance, least=least)

    def _decode_with_torch(self, codes: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
        rows, columns = out.shape
        step = _rows_at_once(columns, out.device)
        memory = torch.empty(min(rows, step) * columns, dtype=torch.float32, device=out.device)
        for first in range(0, rows, step):
            some = out[first : first + step]
            values = memory[: some.numel()].view(some.shape)
            unpack(codes[first : first + step], self.layout, values)
            of_rows = factors_of_rows(factors, first, first + len(some)).reshape(len(some), -1, 2)
            scales, zeros = of_rows.float().permute(2, 0, 1).unsqueeze(-1)
            values.view(len(some), -1, self.group).sub_(_MIDDLE).mul_(scales).add_(zeros)
            some.copy_(values)

    def _matrices(self, weight: torch.Tensor, codes: torch.Tensor, factors: torch.Tensor) -> Iterator[Sequence[torch.Tensor]]:
        """Each matrix of a weight with its codes and factors."""
        of_factors = 4 if self.layout == STRIPS else 3
        return zip(_matrices(weight), _matrices(codes), _matrices(factors, of_factors), strict=True)

    def gains(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a fused product beats decoding for `rows` rows of states, and this layout is one that the machine reads."""
        if device.type != "cpu" or not can_multiply(self.layout):
            return False
        if self.layout == STRIPS:
            return dtype in kernels.BITS
        return rows <= _MOST_ROWS_OF_TORCH and torch_products.has_int4(dtype, device)

    def linear(self, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """`states` [rows, columns] times the weight transposed, which is not rounded to the dtype of `states` first.

        The kernel for strips rounds the states of each group to 8 bits, of the group's largest magnitude.
        """
        codes, factors = stored
        rows, columns = shape
        if factors.dtype != states.dtype or not can_multiply(self.layout):
            return decoded_product(self, states, stored, shape)
        if self.layout == STRIPS:
            return self._multiply_strips(states, codes.view(rows // STRIP_ROWS, -1), factors.view(rows // STRIP_ROWS, -1))
        factors = factors.view(columns // self.group, rows, 2)
        return torch_products.int4_product(states, codes.view(rows, columns // 2), self.group, factors)

    def _multiply_strips(self, states: torch.Tensor, codes: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """`codes` and `factors` [strips, those of a strip]. Some rows of states at a time, to stay in a processor's caches."""
        weight = codes.numpy(), factors.view(kernels.BITS[factors.dtype]).numpy()
        if len(states) <= _STATES_AT_ONCE:
            return self._multiply_some_by_strips(states.detach(), *weight).to(states.dtype)
        out = states.new_empty(len(states), STRIP_ROWS * len(codes))
        for some, some_out in zip(states.detach().split(_STATES_AT_ONCE), out.split(_STATES_AT_ONCE), strict=True):
            some_out.copy_(self._multiply_some_by_strips(some, *weight))
        return out

    def _multiply_some_by_strips(self, states: torch.Tensor, *weight: NDArray[Any]) -> torch.Tensor:
        from rabbit_engine.quantization.kernels.four_bit_products import multiply_strips, round_states

        (rows, columns), strips = states.shape, len(weight[0])
        single = states.to(torch.float32).contiguous()  # numba would compile the kernels once more for strides
        rounded = single.new_empty(rows, columns, dtype=torch.int8)
        scales, out = single.new_empty(rows, columns // self.group), single.new_empty(rows, STRIP_ROWS * strips)
        of_groups = scales.numpy(), scales.new_empty(scales.shape, dtype=torch.int32).numpy()
        kernels.run_rows(round_states, rows, single.numpy(), rounded.numpy(), *of_groups, least=_worth_a_thread(columns))
        fours = rounded.view(torch.int32).numpy()
        least = -(-_PRODUCTS_OF_A_THREAD // (STRIP_ROWS * columns * max(1, rows)))
        kernels.run_rows(multiply_strips, strips, *weight, fours, *of_groups, out.numpy(), least=least)
        return out


def _worth_a_thread(values: int) -> int:
    """How many times so many values are worth a thread."""
    return -(-kernels.THREAD_VALUES // values)


def _rows_at_once(columns: int, device: torch.device) -> int:
    return rows_at_once(_MOST_AT_ONCE, columns * _BLOCK_ROWS, device) * _BLOCK_ROWS


def _matrices(tensor: torch.Tensor, dimensions: int = 2) -> torch.Tensor:
    """The tensor with one dimension before the `dimensions` of a matrix."""
    return tensor.view(-1, *tensor.shape[-dimensions:])


def _factor_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize <= torch.float32.itemsize else torch.float32
