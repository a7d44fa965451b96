"""MXFP4, as GPT-OSS stores its experts: blocks of 32 four-bit floats with one exponent each (OCP Microscaling Formats, 1.0).

`blocks` [experts, out, groups, 16] hold two values per byte, the low four bits first; `scales` [experts, out, groups] hold
exponents biased by 127. The weight is [experts, groups * 32, out]: transposed, as transformers' `Mxfp4Dequantize` returns it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rabbit_engine.storage.encoding import Described, values_at_once
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded

_GROUP = 32
_GROUP_BYTES = _GROUP // 2
_BIAS = 127
_MOST_AT_ONCE = 2**19
"""Values that a CPU decodes together: few enough for its caches, enough to seldom wake torch's threads."""

_VALUE_BYTES = 7
"""Of temporaries for a decoded value."""

_TO_TOP, _TO_PLACE, _HIGH_TO_PLACE = (torch.tensor(shift, dtype=torch.int16, device="cpu") for shift in (12, 3, 5))
_VALUE_BITS = torch.tensor(-0x7200, dtype=torch.int16, device="cpu")
"""The sign of a float16 and the three bits that e2m1's exponent and mantissa are shifted to. These are tensors because torch
would convert a Python number for every operation."""

_EXPONENT_SHIFT = 14
"""Binary places by which a value shrinks when its bits are shifted to float16's positions: the biases are 1 and 15."""

_LARGEST_SHIFTED_EXPONENT = 2 * _BIAS - _EXPONENT_SHIFT
"""Of a group: above it the factor that includes `_EXPONENT_SHIFT` would not be a finite float32."""

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Components: blocks and scales, both uint8."""

    by_rows: ClassVar[bool] = True

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decode some groups of an expert's rows at a time."""
        blocks, scales = stored
        most = values_at_once(_MOST_AT_ONCE, out.device)
        rows = max(1, min(blocks.shape[1], most // _GROUP))
        groups = max(1, most // (rows * _GROUP))
        decode = _decode_shifted if scales.amax() <= _LARGEST_SHIFTED_EXPONENT else _decode_looked_up
        for codes, exponents, weight in zip(blocks, scales, out, strict=True):
            target = weight.view(-1, _GROUP_BYTES, 2, weight.shape[-1])
            for some, of_some, part in zip(codes.split(rows), exponents.split(rows), target.split(rows, dim=3), strict=True):
                for piece in zip(some.split(groups, dim=1), of_some.split(groups, dim=1), part.split(groups), strict=True):
                    decode(*piece)

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """What a piece of an expert needs."""
        del stored
        return _VALUE_BYTES * min(math.prod(out.shape[1:]), max(_GROUP, values_at_once(_MOST_AT_ONCE, device)))


def _decode_shifted(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """uint8 [rows, groups, 16] and [rows, groups] to `out` [groups, 16, 2, rows].

    The bits of a value are shifted to float16's positions, where a processor converts the smallest as fast as others. Bytes are
    transposed in place of values: it takes a fraction of the time.
    """
    shape = (*out.shape[:2], out.shape[-1])
    high, low, single = (
        torch.empty(shape, dtype=dtype, device=out.device) for dtype in (torch.int16, torch.int16, torch.float32)
    )
    high.copy_(blocks.view(torch.int8).permute(1, 2, 0))
    torch.bitwise_left_shift(high, _TO_TOP, out=low)
    torch.bitwise_right_shift(low, _TO_PLACE, out=low)
    torch.bitwise_left_shift(high, _HIGH_TO_PLACE, out=high)
    factors = torch.exp2(scales.t().contiguous().float() - (_BIAS - _EXPONENT_SHIFT))[:, None]
    for half, bits in enumerate((low, high)):
        single.copy_(bits.bitwise_and_(_VALUE_BITS).view(torch.float16))
        out[:, :, half].copy_(single.mul_(factors))


def _decode_looked_up(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """The same for any exponent, as transformers computes it: in the dtype of `out`, infinities included."""
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=out.dtype, device=out.device)
    exponents = (scales.t().to(torch.int32) - _BIAS)[:, None]
    for half in range(2):
        codes = (blocks >> 4 * half & 0xF).permute(1, 2, 0).to(torch.int32)
        values = table.index_select(0, codes.flatten()).view(codes.shape)
        out[:, :, half].copy_(torch.ldexp(values, exponents))


def mxfp4_entry(name: str, dtype: torch.dtype, stored: Mapping[str, TensorEntry]) -> TensorEntry | str:
    """The entry of the weight that "values" (blocks) and "scales" encode, decoded to `dtype`; or the reason why they do not."""
    blocks, scales = stored["values"], stored.get("scales")
    if scales is None:
        return "its scales are not stored"
    if (blocks.dtype, scales.dtype) != (torch.uint8, torch.uint8):
        return f"its blocks are stored in {blocks.dtype}, its scales in {scales.dtype}"
    if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or blocks.shape[-1] * 2 != _GROUP or 0 in blocks.shape:
        return f"blocks of {list(blocks.shape)} have scales of {list(scales.shape)}"
    experts, rows, groups = scales.shape
    return encoded(name, dtype, (experts, groups * _GROUP, rows), Mxfp4(), (blocks, scales))
