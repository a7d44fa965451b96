"""Parts of kernels that read and write 16-bit floats as bits: float32 as uint32, bfloat16 as uint16, float16 as int16."""

from __future__ import annotations

from typing import Any

import numpy as np

from rabbit_engine.quantization.kernels.compiling import part

_BFLOAT16 = np.dtype(np.uint16)


@part
def float16_value(bits: Any) -> Any:
    """A float16 as float32."""
    exponent, mantissa = bits >> 10 & 31, bits & 1023
    if exponent == 31:
        size = np.float32(np.nan if mantissa else np.inf)
    elif exponent == 0:
        size = np.float32(mantissa) * np.float32(2.0**-24)
    else:
        size = np.uint32((exponent + 112) << 23 | mantissa << 13).view(np.float32)
    return -size if bits & 0x8000 else size


@part
def bfloat16_bits(value: Any) -> Any:
    """A float32 rounded to the nearest bfloat16, to the even one of two."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))


@part
def float16_bits(value: Any) -> Any:
    """A float32 rounded to the nearest float16, to the even one of two."""
    bits = np.float32(value).view(np.uint32)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    found = (size + np.uint32(0xFFF) + (size >> np.uint32(13) & np.uint32(1)) - np.uint32(112 << 23)) >> np.uint32(13)
    # 0.5 plus a small number is a multiple of 2**-24, as float16's smallest numbers are
    small = np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    found = small if size < np.uint32(113 << 23) else found
    found = np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else found
    found = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else found
    return np.int16(found | bits >> np.uint32(16) & np.uint32(0x8000))


@part
def rounded(value: Any, out: Any) -> Any:
    """A float32 that is the nearest number of the dtype of `out`."""
    if out.itemsize == 4:
        return value
    if out.dtype == _BFLOAT16:
        return np.uint32(np.uint32(bfloat16_bits(value)) << np.uint32(16)).view(np.float32)
    return float16_value(np.int64(float16_bits(value)) & 0xFFFF)


@part
def put_float(out: Any, place: int, value: Any) -> None:
    """Write a float32, rounded to the dtype of `out` [n]."""
    if out.itemsize == 4:
        out[place] = np.float32(value).view(np.uint32)
    elif out.dtype == _BFLOAT16:
        out[place] = bfloat16_bits(value)
    else:
        out[place] = float16_bits(value)
