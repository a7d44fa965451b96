"""MXFP4, as GPT-OSS stores its experts: blocks of 32 four-bit floats with one exponent each (OCP Microscaling Formats, 1.0).

`blocks` [experts, out, groups, 16] hold two values per byte, the low four bits first; `scales` [experts, out, groups] hold
exponents biased by 127. The weight is [experts, groups * 32, out]: transposed, as transformers' `Mxfp4Dequantize` returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rabbit_engine.storage.encoding import WORK_BYTES
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded

_GROUP = 32
_BIAS = 127
_LARGEST_FAST_EXPONENT = 128
"""Above it the factor of a group, which includes the compensation for the bit shift, would not be a finite float32."""

_VALUE_BITS = -0x7E400000
"""The sign bit of a float32, and the three bits that e2m1's exponent and mantissa are shifted to."""

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Components: blocks and scales, both uint8."""

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decode some rows at a time, transposing each expert on the way."""
        blocks, scales = stored
        rows, groups = scales.shape[-2:]
        step = max(1, WORK_BYTES // (4 * 4 * _GROUP * groups))
        values = _Values(min(rows, step) * groups, out.dtype, out.device)
        for expert in range(len(blocks)):
            for row in range(0, rows, step):
                part = slice(row, row + step)
                out[expert, :, part].copy_(values(blocks[expert, part], scales[expert, part]).flatten(1).t())


class _Values:
    """The values of blocks, which round to those in `dtype`. The memory for `most` blocks is reused."""

    def __init__(self, most: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._codes = torch.empty(most * _GROUP // 2, dtype=torch.int32, device=device)
        self._shifted = torch.empty_like(self._codes)
        self._found = torch.empty(most * _GROUP, dtype=torch.int32, device=device)

    def __call__(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """[rows, groups, 32] of uint8 [rows, groups, 16] and [rows, groups], overwritten by the next call."""
        if int(scales.amax()) > _LARGEST_FAST_EXPONENT:
            return _looked_up(blocks, scales, self._dtype)
        factor = torch.exp2(scales.to(torch.float32) - 1)[..., None]  # 2 ** (scale - 127) of the format, 2 ** 126 of the shift
        codes, shifted = (memory[: blocks.numel()].view(blocks.shape) for memory in (self._codes, self._shifted))
        found = self._found[: scales.numel() * _GROUP].view(*scales.shape, _GROUP)
        codes.copy_(blocks)
        for half, shift in ((0, 28), (1, 24)):  # the low four bits of a byte, then the high ones: each to the top, then in place
            torch.bitwise_left_shift(codes, shift, out=shifted)
            found[..., half::2].copy_(shifted.bitwise_right_shift_(6))
        return found.bitwise_and_(_VALUE_BITS).view(torch.float32).mul_(factor)


def _looked_up(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same for any exponent, as transformers computes it: in `dtype`, infinities included."""
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=dtype, device=blocks.device)
    codes = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2)
    return torch.ldexp(table[codes.to(torch.int32)], (scales.to(torch.int32) - _BIAS)[..., None])


def mxfp4_entry(name: str, dtype: torch.dtype, blocks: TensorEntry, scales: TensorEntry | None) -> TensorEntry | str:
    """The entry of the weight that `blocks` and `scales` encode, decoded to `dtype`; or the reason why they do not."""
    if scales is None:
        return "its scales are not stored"
    if (blocks.dtype, scales.dtype) != (torch.uint8, torch.uint8):
        return f"its blocks are stored in {blocks.dtype}, its scales in {scales.dtype}"
    if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or blocks.shape[-1] * 2 != _GROUP or 0 in blocks.shape:
        return f"blocks of {list(blocks.shape)} have scales of {list(scales.shape)}"
    experts, rows, groups = scales.shape
    return encoded(name, dtype, (experts, groups * _GROUP, rows), Mxfp4(), (blocks, scales))
