"""FP8 with one scale per block, as DeepSeek-V3 stores its projections: `weight` e4m3 and `weight_scale_inv`.

A weight [..., rows, columns] is cut into a grid of blocks of equal size, one scale each; its values are
`float32(weight) * float32(scale)`, rounded once to the model's dtype, as `Fp8Dequantize` of transformers computes them.
In a matrix whose sizes are no multiples of the block's, the last blocks are smaller, as in DeepSeek-V3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rabbit_engine.quantization import kernels
from rabbit_engine.quantization.columns import run_product
from rabbit_engine.quantization.decoded_product import decoded_product
from rabbit_engine.storage.encoding import Described, rows_at_once
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded

_MOST_AT_ONCE = 2**20
"""Values that a CPU decodes together: few enough for its caches, enough to seldom wake torch's threads."""

_VALUE_BYTES, _SCALE_BYTES = 2 + 4, 20
"""Of temporaries: a value in float16 and float32, a scale in several steps."""

_SHIFT = torch.tensor(7, dtype=torch.int16, device="cpu")
_VALUE_BITS = torch.tensor(-0x4080, dtype=torch.int16, device="cpu")
"""The sign of a float16 and the seven bits that e4m3's exponent and mantissa are shifted to. Both are tensors because torch
would convert a Python number for every operation."""

_EXPONENT_SHIFT = 2.0**8
"""Factor by which an e4m3 value shrinks when its bits are shifted to float16's positions: the biases are 7 and 15."""

_LARGEST_SHIFTED_SCALE = 2.0**119
"""A larger scale times `_EXPONENT_SHIFT` might overflow float32."""

_LARGEST_CODE = 0x7E
"""The code of 448, without the sign; the next one is NaN, which float16 has elsewhere."""

_MOST_FUSED_ROWS = 8
"""Rows of states for which the fused product is faster than decoding followed by torch's product; see docs/benchmarks.md."""

_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e8m0fnu, torch.uint8)


Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Stored values, scales, and where decoded values go."""


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """Components: the weight in an eight-bit float, and its scales, one for each block.

    `block` is the size of one, rows and columns, where the last ones are smaller; None where all are equal.
    """

    block: tuple[int, int] | None = None

    fused_by_default: ClassVar[bool] = False

    @property
    def by_rows(self) -> bool:
        """Whether the same number of rows belongs to each row of scales."""
        return self.block is None

    def gains(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernel multiplies this many rows of states faster than decoding does."""
        fits = self.block is None and dtype in kernels.BITS
        return fits and rows <= _MOST_FUSED_ROWS and kernels.can_run(device)

    def linear(self, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """`states` [rows, columns] times the weight transposed, whose values are not rounded to their dtype."""
        weight, scales = stored
        if weight.dtype != torch.float8_e4m3fn or not self.gains(1, states.dtype, states.device):
            return decoded_product(self, states, stored, shape)
        from rabbit_engine.quantization.kernels.packed_products import multiply_fp8

        codes = weight.view(torch.uint8).view(*shape)
        return run_product(multiply_fp8, states, shape, codes.numpy(), _grid(scales).contiguous().numpy())

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decode some rows at a time: to float32, times their scales, to the dtype of `out`."""
        weight, scales = stored
        columns, grid = weight.shape[-1], _grid(scales)
        values, target = weight.view(-1, columns), out.view(-1, columns)
        can_shift = _can_shift(values, grid)
        if can_shift:
            grid = grid * _EXPONENT_SHIFT
        at_once = rows_at_once(_MOST_AT_ONCE, columns, out.device)
        most = min(at_once * columns, out.numel())
        half, single = (torch.empty(most, dtype=dtype, device=out.device) for dtype in (torch.int16, torch.float32))
        for region in _regions(values, grid, target, self.block):
            for codes, factors, decoded in _pieces(*region, at_once):
                wide = single[: codes.numel()].view(codes.shape)
                wide.copy_(_shifted(codes, half) if can_shift else codes)
                count = factors.shape[1]
                wide.view(len(factors), -1, count, codes.shape[1] // count).mul_(factors[:, None, :, None])
                decoded.copy_(wide)

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """The scales in float32, and a piece."""
        most = rows_at_once(_MOST_AT_ONCE, out.shape[-1], device) * out.shape[-1]
        return _SCALE_BYTES * math.prod(stored[1].shape) + _VALUE_BYTES * min(math.prod(out.shape), most)


def _grid(scales: torch.Tensor) -> torch.Tensor:
    """The scales in float32, [rows of blocks, blocks in a row]; bytes are exponents, biased by 127."""
    found = _powers(scales) if scales.dtype == torch.uint8 else scales.float()
    return found.reshape(-1, scales.shape[-1] if scales.ndim >= 2 else 1)


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** (exponent - 127) of bytes, made of bits: a GPU's exp2 of -127, which is subnormal, is off by an ulp."""
    return torch.where(exponents == 0, 2**22, exponents.int() << 23).view(torch.float32)


def _can_shift(values: torch.Tensor, grid: torch.Tensor) -> bool:
    """Whether `_shifted` converts the values, which takes a twentieth of torch's time on a CPU: finite e4m3 ones."""
    if values.device.type != "cpu" or values.dtype != torch.float8_e4m3fn or not grid.abs().amax() < _LARGEST_SHIFTED_SCALE:
        return False  # one scale that is NaN makes the largest NaN
    positive, negative = values.view(torch.int8).amax(), values.view(torch.uint8).amax()
    return bool(positive <= _LARGEST_CODE and negative <= 0x80 + _LARGEST_CODE)


def _regions(values: torch.Tensor, grid: torch.Tensor, target: torch.Tensor, block: tuple[int, int] | None) -> Iterator[Matrices]:
    """Parts of `values`, `grid` and `target` with equal blocks: at most whole ones, those at the right, and those at the end."""
    if block is None:
        yield values, grid, target
        return
    for first, stop, top, bottom in _spans(len(values), block[0]):
        for left, right, start, end in _spans(values.shape[1], block[1]):
            yield values[first:stop, left:right], grid[top:bottom, start:end], target[first:stop, left:right]


def _spans(length: int, size: int) -> list[tuple[int, int, int, int]]:
    """The range of whole blocks in `length`, and that of the smaller one after them: of values, then of blocks."""
    count = length // size
    spans = [(0, count * size, 0, count), (count * size, length, count, count + 1)]
    return [span for span in spans if span[0] < span[1]]


def _pieces(values: torch.Tensor, grid: torch.Tensor, target: torch.Tensor, at_once: int) -> Iterator[Matrices]:
    """At most `at_once` rows of `values` and `target`, which are whole rows of blocks or lie in one, and their scales."""
    block_rows = len(values) // len(grid)
    blocks = max(1, at_once // block_rows)
    rows = blocks * block_rows
    for codes, factors, decoded in zip(values.split(rows), grid.split(blocks), target.split(rows), strict=True):
        for some, out in zip(codes.split(at_once), decoded.split(at_once), strict=True):
            yield some, factors, out


def _shifted(codes: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """e4m3 values over `_EXPONENT_SHIFT`, as float16 in `memory`.

    The sign goes where float16 has its sign, the seven bits after it go to the lowest four of the exponent and the highest
    three of the mantissa. A processor converts the smallest values, whose exponent is 0 in both, as fast as others.
    """
    bits = memory[: codes.numel()].view(codes.shape)
    bits.copy_(codes.view(torch.int8))
    torch.bitwise_left_shift(bits, _SHIFT, out=bits)
    return bits.bitwise_and_(_VALUE_BITS).view(torch.float16)


def fp8_entry(
    name: str, dtype: torch.dtype, stored: Mapping[str, TensorEntry], block: tuple[int, int] | None = None
) -> TensorEntry | str:
    """The entry of the weight that "values" and "scales" encode, decoded to `dtype`; or the reason why they do not.

    Scales in the number that blocks of the size `block` need are for such blocks, in another number for equal ones. Without
    scales it is the values, which are not quantised.
    """
    weight, scales = stored["values"], stored.get("scales")
    if scales is None:
        return weight
    if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return f"{weight.dtype} has scales"
    if scales.dtype not in _SCALES:
        return f"its scales are {scales.dtype}"
    grid = scales.shape if len(scales.shape) >= 2 else (1, 1) if scales.shape in ((), (1,)) else ()
    if len(weight.shape) < 2 or len(grid) < 2 or 0 in (*grid, *weight.shape):
        return f"{list(weight.shape)} values have scales of {list(scales.shape)}"
    if weight.shape[-1] > _MOST_AT_ONCE:
        return f"its rows have {weight.shape[-1]} values, more than are decoded at once"
    smaller = block if block is not None and _ends_in_smaller_blocks(weight.shape, grid, block) else None
    fits = all(size % count == 0 for size, count in zip(weight.shape[-2:], grid[-2:], strict=True))
    if grid[:-2] != weight.shape[:-2] or not (fits or smaller):
        return f"{list(weight.shape)} values cannot be cut into blocks for {list(scales.shape)} scales"
    return encoded(name, dtype, weight.shape, Fp8Blocks(smaller), (weight, scales))


def _ends_in_smaller_blocks(shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int]) -> bool:
    """Whether a matrix consists of that many blocks of the size `block`, the last ones of which are smaller."""
    needed = tuple(-(-size // most) for size, most in zip(shape, block, strict=False))
    return len(shape) == 2 and grid == needed and any(size % most for size, most in zip(shape, block, strict=True))
