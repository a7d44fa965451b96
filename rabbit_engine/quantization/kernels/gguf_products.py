"""Kernels that multiply by weights in GGUF's blocks: a few values at a time are decoded to float32, and multiplied at once.

Q4_1 and Q3_K have none: decoding them, then torch's product, is as fast.

All write columns `first` to `stop` of `out` float32 [states, rows]: `states` float32 [states, columns] times rows `first` to
`stop` of the weight. Row r is decoded from row `order[r]` of `stored` uint8 [rows, bytes], or from row r where `order` is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from rabbit_engine.quantization.kernels import gguf
from rabbit_engine.quantization.kernels.compiling import part, product_kernel, product_part
from rabbit_engine.quantization.kernels.gguf import Bytes, Order, Unpack

Floats = NDArray[np.float32]

_MOST_AT_ONCE = 512
"""Values that are decoded before they are multiplied: they stay in the first cache."""


@product_part
def _dot(values: Floats, states: Floats) -> np.float32:
    """The sum of the products with as many values as there are states."""
    total = np.float32(0)
    for i in range(len(states)):
        total += values[i] * states[i]
    return total


@part
def _write_scaled(codes: NDArray[np.int8], values: Floats, a: np.float32) -> None:
    for i in range(len(values)):
        values[i] = a * np.float32(codes[i])


@part
def _multiply(
    first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats, unpack: Unpack, nbytes: int, count: int
) -> None:
    """Multiply by rows of blocks of `nbytes`, which hold `count` values."""
    values = np.empty(_MOST_AT_ONCE, np.float32)
    bits, blocks, together = values.view(np.uint32), stored.shape[1] // nbytes, _MOST_AT_ONCE // count
    for row in range(first, stop):
        source = order[row] if len(order) else row
        out[:, row] = 0
        for start in range(0, blocks, together):
            some = min(together, blocks - start)
            for index in range(some):
                block = stored[source, (start + index) * nbytes : (start + index + 1) * nbytes]
                unpack(block, bits[index * count : (index + 1) * count], None)
            column, length = start * count, some * count
            for which in range(len(states)):
                out[which, row] += _dot(values, states[which, column : column + length])


@product_kernel
def q4_0(first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats) -> None:
    """Multiply by Q4_0."""
    _multiply(first, stop, stored, order, states, out, gguf.unpack_q4_0, 18, 32)


@product_kernel
def q5_0(first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats) -> None:
    """Multiply by Q5_0."""
    _multiply(first, stop, stored, order, states, out, gguf.unpack_q5_0, 22, 32)


@product_kernel
def q5_1(first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats) -> None:
    """Multiply by Q5_1."""
    _multiply(first, stop, stored, order, states, out, gguf.unpack_q5_1, 24, 32)


@product_kernel
def q8_0(first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats) -> None:
    """Multiply by Q8_0, whose small blocks LLVM vectorises only in a loop like this one."""
    values, codes, blocks = np.empty(_MOST_AT_ONCE, np.float32), stored.view(np.int8), stored.shape[1] // 34
    for row in range(first, stop):
        source = order[row] if len(order) else row
        out[:, row] = 0
        for start in range(0, blocks, 16):
            some = min(16, blocks - start)
            for index in range(some):
                at, place = (start + index) * 34, index * 32
                scale = gguf.half_at(stored[source, at : at + 2], 0)
                _write_scaled(codes[source, at + 2 : at + 34], values[place : place + 32], scale)
            for which in range(len(states)):
                out[which, row] += _dot(values, states[which, start * 32 : (start + some) * 32])


@product_kernel
def q2_k(first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats) -> None:
    """Multiply by Q2_K."""
    _multiply(first, stop, stored, order, states, out, gguf.unpack_q2_k, 84, 256)


@product_kernel
def q4_k(first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats) -> None:
    """Multiply by Q4_K."""
    _multiply(first, stop, stored, order, states, out, gguf.unpack_q4_k, 144, 256)


@product_kernel
def q5_k(first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats) -> None:
    """Multiply by Q5_K."""
    _multiply(first, stop, stored, order, states, out, gguf.unpack_q5_k, 176, 256)


@product_kernel
def q6_k(first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats) -> None:
    """Multiply by Q6_K."""
    _multiply(first, stop, stored, order, states, out, gguf.unpack_q6_k, 210, 256)


@product_kernel
def iq4_nl(first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats) -> None:
    """Multiply by IQ4_NL."""
    _multiply(first, stop, stored, order, states, out, gguf.unpack_iq4_nl, 18, 32)


@product_kernel
def iq4_xs(first: int, stop: int, stored: Bytes, order: Order, states: Floats, out: Floats) -> None:
    """Multiply by IQ4_XS."""
    _multiply(first, stop, stored, order, states, out, gguf.unpack_iq4_xs, 136, 256)


PRODUCTS: Mapping[str, Callable[..., None]] = {
    "Q4_0": q4_0,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
}
