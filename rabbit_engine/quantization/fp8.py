"""FP8 with one scale per block, as DeepSeek-V3 stores its projections: `weight` e4m3 and `weight_scale_inv`.

A weight [..., rows, columns] is cut into a grid of blocks of equal size, one scale each; its values are
`float32(weight) * float32(scale)`, rounded once to the model's dtype, as `Fp8Dequantize` of transformers computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rabbit_engine.storage.encoding import WORK_BYTES
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded

_EXPONENT_SHIFT = 2.0**120
"""Factor by which an e4m3 value shrinks when its bits are shifted to float32's positions: the biases are 7 and 127."""

_LARGEST_FAST_SCALE = 2.0**7
"""A larger scale times the shift might overflow float32."""

_NAN_CODE = 0x7F
_VALUE_BITS = -0x78100000
"""The sign of a float32 and the seven bits that e4m3's exponent and mantissa are shifted to."""

_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e8m0fnu, torch.uint8)


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """Components: the weight in an eight-bit float, and its scales, one for each block."""

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decode one row of blocks at a time, so that temporaries stay in the processor's caches."""
        weight, scales = stored
        columns = weight.shape[-1]
        grid = _grid(scales)
        block_rows, block_columns = weight.shape[-2] // grid.shape[-2], columns // grid.shape[-1]
        values, target = weight.view(-1, columns), out.view(-1, columns)
        step = min(block_rows, max(1, WORK_BYTES // (2 * 4 * columns)))
        product = _ShiftedProduct(step * columns) if _can_shift(weight, grid) else _product
        for index, scale in enumerate(grid.view(-1, 1, grid.shape[-1], 1)):
            end = (index + 1) * block_rows
            for row in range(end - block_rows, end, step):
                rows = slice(row, min(row + step, end))
                blocks = values[rows].view(-1, grid.shape[-1], block_columns)
                target[rows].view(blocks.shape).copy_(product(blocks, scale))


def _grid(scales: torch.Tensor) -> torch.Tensor:
    """The scales in float32, [..., block rows, block columns]; bytes are exponents, biased by 127."""
    found = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    return found if found.ndim >= 2 else found.reshape(1, 1)


def _can_shift(weight: torch.Tensor, grid: torch.Tensor) -> bool:
    is_e4m3 = weight.dtype == torch.float8_e4m3fn
    return weight.device.type == "cpu" and is_e4m3 and bool(grid.abs().amax() < _LARGEST_FAST_SCALE)


def _product(block: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return block.float().mul_(scale)


class _ShiftedProduct:
    """The same values. torch converts eight-bit floats one by one on a CPU; shifting their bits into place is 20 times faster.

    The sign goes where float32 has its sign, the seven bits after it go where float32 has the lowest four of the exponent and
    the highest three of the mantissa; a NaN has no such place. The memory for `most` values is reused: claiming it for every
    block would take four times as long as the arithmetic.
    """

    def __init__(self, most: int) -> None:
        self._shifted = torch.empty(most, dtype=torch.int32, device="cpu")
        self._codes = torch.empty(most, dtype=torch.uint8, device="cpu")

    def __call__(self, block: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """float32 of `block`'s shape, overwritten by the next call."""
        codes, shifted = (memory[: block.numel()].view(block.shape) for memory in (self._codes, self._shifted))
        if int(torch.bitwise_and(block.view(torch.uint8), _NAN_CODE, out=codes).amax()) == _NAN_CODE:
            return _product(block, scale)
        torch.bitwise_left_shift(shifted.copy_(block.view(torch.int8)), 20, out=shifted)
        return shifted.bitwise_and_(_VALUE_BITS).view(torch.float32).mul_(scale * _EXPONENT_SHIFT)


def fp8_entry(name: str, dtype: torch.dtype, weight: TensorEntry, scales: TensorEntry | None) -> TensorEntry | str:
    """The entry of the weight that `weight` and `scales` encode, decoded to `dtype`; or the reason why they do not.

    Without scales it is `weight` itself, which is not quantised.
    """
    if scales is None:
        return weight
    if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return f"{weight.dtype} has scales"
    if scales.dtype not in _SCALES:
        return f"its scales are {scales.dtype}"
    grid = scales.shape if len(scales.shape) >= 2 else (1, 1) if scales.shape in ((), (1,)) else ()
    if len(weight.shape) < 2 or len(grid) not in (2, len(weight.shape)) or 0 in (*grid, *weight.shape):
        return f"{list(weight.shape)} values have scales of {list(scales.shape)}"
    batch = weight.shape[:-2] if len(grid) == len(weight.shape) else grid[:-2]
    fits = all(size % count == 0 for size, count in zip(weight.shape[-2:], grid[-2:], strict=True))
    if not fits or batch != weight.shape[:-2]:
        return f"{list(weight.shape)} values cannot be cut into blocks for {list(scales.shape)} scales"
    return encoded(name, dtype, weight.shape, Fp8Blocks(), (weight, scales))
