"""Kernels that decode GGUF's blocks. A block holds small integers q, and for each group of them a scale a and a minimum c.

A value is `a * q - c` in float32, rounded once to the weight's dtype; or each step is rounded to it (`stepwise`). All kernels
write rows `first` to `stop` of `out` [rows, columns], the bits of the values: float32 as uint32, bfloat16 as uint16, float16 as
int16. Row r is decoded from row `order[r]` of `stored` uint8 [rows, bytes], or from row r where `order` is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rabbit_engine.quantization.kernels.compiling import kernel, part
from rabbit_engine.quantization.kernels.floats import float16_value, put_float, rounded

Bytes = NDArray[np.uint8]
Order = NDArray[np.int64]
Out = NDArray[np.uint32] | NDArray[np.uint16] | NDArray[np.int16]
Stepwise = bool | None
"""True, or None for values that are rounded once: a kernel is compiled for each."""

Unpack = Callable[[Bytes, Out, Stepwise], None]
"""Writes the values of one block."""

_ZERO = np.float32(0)

_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""What the four-bit codes of IQ4_NL and IQ4_XS stand for."""


@part
def half_at(block: Bytes, place: int) -> Any:
    """The float16 at byte `place`, as float32."""
    return float16_value(np.int64(block[place]) | np.int64(block[place + 1]) << 8)


@part
def _scale(value: Any, out: Out, stepwise: Stepwise) -> Any:
    """A scale or a minimum, rounded if each step is."""
    return value if stepwise is None else rounded(value, out)


@part
def _put(out: Out, place: int, a: Any, q: Any, c: Any, stepwise: Stepwise) -> None:
    """Write `a * q - c`."""
    value = a * np.float32(q)
    if stepwise is not None:
        value = rounded(value, out)
    put_float(out, place, np.float32(value - c))


@part
def _put_pair(out: Out, place: int, distance: int, a: Any, codes: Any, less: int, c: Any, stepwise: Stepwise) -> None:
    """Write the values of the low and the high four bits of `codes`, `distance` apart."""
    _put(out, place, a, np.int32(codes & 15) - less, c, stepwise)
    _put(out, place + distance, a, np.int32(codes >> 4) - less, c, stepwise)


@part
def _decode(
    first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise, unpack: Unpack, nbytes: int, count: int
) -> None:
    """Decode rows of blocks of `nbytes`, which hold `count` values."""
    for row in range(first, stop):
        source = order[row] if len(order) else row
        for index in range(stored.shape[1] // nbytes):
            block = stored[source, index * nbytes : (index + 1) * nbytes]
            unpack(block, out[row, index * count : (index + 1) * count], stepwise)


@part
def unpack_q4_0(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of Q4_0."""
    a = _scale(half_at(block, 0), out, stepwise)
    for i in range(len(out) // 2):
        _put_pair(out, i, 16, a, block[2 + i], 8, _ZERO, stepwise)


@part
def unpack_q4_1(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of Q4_1."""
    a, c = _scale(half_at(block, 0), out, stepwise), _scale(-half_at(block, 2), out, stepwise)
    for i in range(16):
        _put_pair(out, i, 16, a, block[4 + i], 0, c, stepwise)


@part
def _fifth_bits(block: Bytes, at: int) -> Any:
    """Four bytes: bit i is worth 16 in value i."""
    return np.uint32(block[at]) | block[at + 1] << 8 | block[at + 2] << 16 | block[at + 3] << 24


@part
def _put_five(out: Out, i: int, a: Any, codes: Any, high: Any, less: int, c: Any, stepwise: Stepwise) -> None:
    """Write values i and i + 16 of a block."""
    _put(out, i, a, np.int32(codes & 15 | (high >> i & 1) << 4) - less, c, stepwise)
    _put(out, i + 16, a, np.int32(codes >> 4 | (high >> (i + 16) & 1) << 4) - less, c, stepwise)


@part
def unpack_q5_0(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of Q5_0."""
    a, high = _scale(half_at(block, 0), out, stepwise), _fifth_bits(block, 2)
    for i in range(16):
        _put_five(out, i, a, block[6 + i], high, 16, _ZERO, stepwise)


@part
def unpack_q5_1(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of Q5_1."""
    a, c = _scale(half_at(block, 0), out, stepwise), _scale(-half_at(block, 2), out, stepwise)
    high = _fifth_bits(block, 4)
    for i in range(16):
        _put_five(out, i, a, block[8 + i], high, 0, c, stepwise)


@part
def unpack_q8_0(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of Q8_0."""
    a = _scale(half_at(block, 0), out, stepwise)
    for i in range(32):
        _put(out, i, a, np.int8(block[2 + i]), _ZERO, stepwise)


@part
def unpack_q2_k(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of Q2_K."""
    d, low = _scale(half_at(block, 80), out, stepwise), _scale(half_at(block, 82), out, stepwise)
    for half in range(2):
        for shift in range(4):
            for side in range(2):
                scales = block[half * 8 + shift * 2 + side]
                a = _scale(d * np.float32(scales & 15), out, stepwise)
                c = _scale(low * np.float32(scales >> 4), out, stepwise)
                codes, place = 16 + half * 32 + side * 16, half * 128 + shift * 32 + side * 16
                for i in range(16):
                    _put(out, place + i, a, block[codes + i] >> (2 * shift) & 3, c, stepwise)


@part
def unpack_q3_k(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of Q3_K."""
    d = _scale(half_at(block, 108), out, stepwise)
    for g in range(16):
        low, high = block[96 + (g & 7)] >> (4 * (g >> 3)) & 15, block[104 + (g & 3)] >> (2 * (g >> 2)) & 3
        a = _scale(d * np.float32(np.int32(low | high << 4) - 32), out, stepwise)
        shift, codes, masks = 2 * (g >> 1 & 3), 32 + 32 * (g >> 3) + 16 * (g & 1), 16 * (g & 1)
        for i in range(16):
            borrow = (block[masks + i] >> (g >> 1) & 1 ^ 1) << 2
            _put(out, g * 16 + i, a, np.int32(block[codes + i] >> shift & 3) - np.int32(borrow), _ZERO, stepwise)


@part
def _six_bits(block: Bytes, g: int) -> tuple[Any, Any]:
    """Scale and minimum of group g of Q4_K and Q5_K: eight of six bits each, in bytes 4 to 16."""
    if g < 4:
        return np.float32(block[4 + g] & 63), np.float32(block[8 + g] & 63)
    return np.float32(block[8 + g] & 15 | block[g] >> 6 << 4), np.float32(block[8 + g] >> 4 | block[4 + g] >> 6 << 4)


@part
def unpack_q4_k(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of Q4_K."""
    d, low = half_at(block, 0), half_at(block, 2)
    for pair in range(4):
        (a0, c0), (a1, c1) = _six_bits(block, 2 * pair), _six_bits(block, 2 * pair + 1)
        a0, c0 = _scale(d * a0, out, stepwise), _scale(low * c0, out, stepwise)
        a1, c1 = _scale(d * a1, out, stepwise), _scale(low * c1, out, stepwise)
        for i in range(32):
            codes = block[16 + pair * 32 + i]
            _put(out, pair * 64 + i, a0, codes & 15, c0, stepwise)
            _put(out, pair * 64 + 32 + i, a1, codes >> 4, c1, stepwise)


@part
def unpack_q5_k(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of Q5_K."""
    d, low = half_at(block, 0), half_at(block, 2)
    for pair in range(4):
        (a0, c0), (a1, c1) = _six_bits(block, 2 * pair), _six_bits(block, 2 * pair + 1)
        a0, c0 = _scale(d * a0, out, stepwise), _scale(low * c0, out, stepwise)
        a1, c1 = _scale(d * a1, out, stepwise), _scale(low * c1, out, stepwise)
        for i in range(32):
            codes, high = block[48 + pair * 32 + i], block[16 + i] >> (2 * pair)
            _put(out, pair * 64 + i, a0, codes & 15 | (high & 1) << 4, c0, stepwise)
            _put(out, pair * 64 + 32 + i, a1, codes >> 4 | (high >> 1 & 1) << 4, c1, stepwise)


@part
def unpack_q6_k(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of Q6_K."""
    d = half_at(block, 208)
    for piece in range(4):  # 16 of the 32 columns of a half
        half, column = piece >> 1, 16 * (piece & 1)
        scales, codes, highs = 192 + 8 * half + (piece & 1), 64 * half + column, 128 + 32 * half + column
        a0 = _scale(d * np.float32(np.int8(block[scales])), out, stepwise)
        a1 = _scale(d * np.float32(np.int8(block[scales + 2])), out, stepwise)
        a2 = _scale(d * np.float32(np.int8(block[scales + 4])), out, stepwise)
        a3 = _scale(d * np.float32(np.int8(block[scales + 6])), out, stepwise)
        for i in range(16):
            near, far, high, place = block[codes + i], block[codes + 32 + i], block[highs + i], 128 * half + column + i
            _put(out, place, a0, np.int32(near & 15 | (high & 3) << 4) - 32, _ZERO, stepwise)
            _put(out, place + 32, a1, np.int32(far & 15 | (high >> 2 & 3) << 4) - 32, _ZERO, stepwise)
            _put(out, place + 64, a2, np.int32(near >> 4 | (high >> 4 & 3) << 4) - 32, _ZERO, stepwise)
            _put(out, place + 96, a3, np.int32(far >> 4 | (high >> 6) << 4) - 32, _ZERO, stepwise)


@part
def unpack_iq4_nl(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of IQ4_NL."""
    a = _scale(half_at(block, 0), out, stepwise)
    for i in range(16):
        _put(out, i, a, _LEVELS[block[2 + i] & 15], _ZERO, stepwise)
        _put(out, i + 16, a, _LEVELS[block[2 + i] >> 4], _ZERO, stepwise)


@part
def unpack_iq4_xs(block: Bytes, out: Out, stepwise: Stepwise) -> None:
    """Write the values of a block of IQ4_XS."""
    d, highs = _scale(half_at(block, 0), out, stepwise), np.int32(block[2]) | np.int32(block[3]) << 8
    for g in range(8):
        low = block[4 + (g >> 1)] >> (4 * (g & 1)) & 15
        a = _scale(d * np.float32(np.int32(low | (highs >> (2 * g) & 3) << 4) - 32), out, stepwise)
        for i in range(16):
            codes = block[8 + g * 16 + i]
            _put(out, g * 32 + i, a, _LEVELS[codes & 15], _ZERO, stepwise)
            _put(out, g * 32 + 16 + i, a, _LEVELS[codes >> 4], _ZERO, stepwise)


@kernel
def q4_0(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode Q4_0."""
    _decode(first, stop, stored, order, out, stepwise, unpack_q4_0, 18, 32)


@kernel
def q4_1(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode Q4_1."""
    _decode(first, stop, stored, order, out, stepwise, unpack_q4_1, 20, 32)


@kernel
def q5_0(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode Q5_0."""
    _decode(first, stop, stored, order, out, stepwise, unpack_q5_0, 22, 32)


@kernel
def q5_1(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode Q5_1."""
    _decode(first, stop, stored, order, out, stepwise, unpack_q5_1, 24, 32)


@kernel
def q8_0(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode Q8_0."""
    _decode(first, stop, stored, order, out, stepwise, unpack_q8_0, 34, 32)


@kernel
def q2_k(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode Q2_K."""
    _decode(first, stop, stored, order, out, stepwise, unpack_q2_k, 84, 256)


@kernel
def q3_k(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode Q3_K."""
    _decode(first, stop, stored, order, out, stepwise, unpack_q3_k, 110, 256)


@kernel
def q4_k(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode Q4_K."""
    _decode(first, stop, stored, order, out, stepwise, unpack_q4_k, 144, 256)


@kernel
def q5_k(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode Q5_K."""
    _decode(first, stop, stored, order, out, stepwise, unpack_q5_k, 176, 256)


@kernel
def q6_k(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode Q6_K."""
    _decode(first, stop, stored, order, out, stepwise, unpack_q6_k, 210, 256)


@kernel
def iq4_nl(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode IQ4_NL."""
    _decode(first, stop, stored, order, out, stepwise, unpack_iq4_nl, 18, 32)


@kernel
def iq4_xs(first: int, stop: int, stored: Bytes, order: Order, out: Out, stepwise: Stepwise) -> None:
    """Decode IQ4_XS."""
    _decode(first, stop, stored, order, out, stepwise, unpack_iq4_xs, 136, 256)


DECODERS: Mapping[str, Callable[..., None]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
}
