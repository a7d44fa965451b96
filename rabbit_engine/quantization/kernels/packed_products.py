"""Kernels that multiply a few rows of states by bitsandbytes' blocks, compressed-tensors' integers of four bits, and FP8.

Each row of the weight is decoded to float32 in a processor's nearest cache, without rounding, and multiplied there. All compute
rows `first` to `stop` of the weight, from `states` float32 [rows of states, columns] to `out` float32 [rows of states, rows].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabbit_engine.quantization.kernels.compiling import product_kernel

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@product_kernel
def multiply_blocks(
    first: int, stop: int, codes: Bytes, absmax: Floats, pairs: NDArray[np.uint64], states: Floats, out: Floats
) -> None:
    """`codes` [rows, columns / 2], `absmax` [rows, blocks], and `pairs` [256], the bits of the two float32 of a byte."""
    bits, block = np.empty(codes.shape[1], np.uint64), 2 * codes.shape[1] // absmax.shape[1]
    values = bits.view(np.float32)
    for row in range(first, stop):
        some = codes[row]
        for place in range(len(some)):
            bits[place] = pairs[some[place]]
        for index in range(absmax.shape[1]):
            scale, part = absmax[row, index], values[index * block : (index + 1) * block]
            for place in range(len(part)):
                part[place] *= scale
        for state in range(len(states)):
            total, numbers = np.float32(0), states[state]
            for place in range(len(values)):
                total += values[place] * numbers[place]
            out[state, row] = total


@product_kernel
def multiply_nibbles(
    first: int, stop: int, codes: Bytes, zeros: Floats, scales: Floats, size: int, states: Floats, out: Floats
) -> None:
    """`codes` [rows, columns / 2 or more], low bits first, zeros and scales [rows, groups], groups of `size` values."""
    values = np.empty(scales.shape[1] * size, np.float32)
    for row in range(first, stop):
        for group in range(scales.shape[1]):
            zero, scale, part = zeros[row, group], scales[row, group], values[group * size : (group + 1) * size]
            some = codes[row, group * size // 2 : (group + 1) * size // 2]
            for place in range(len(some)):
                part[2 * place] = (np.float32(some[place] & np.uint8(15)) - zero) * scale
                part[2 * place + 1] = (np.float32(some[place] >> np.uint8(4)) - zero) * scale
        for state in range(len(states)):
            total, numbers = np.float32(0), states[state]
            for place in range(len(values)):
                total += values[place] * numbers[place]
            out[state, row] = total


@product_kernel
def multiply_fp8(first: int, stop: int, codes: Bytes, grid: Floats, states: Floats, out: Floats) -> None:
    """`codes` [rows, columns] of e4m3, and the scale of each block, [rows of blocks, blocks in a row].

    The seven bits of a magnitude are those of a float32 whose exponent is 120 less; 0x7F is NaN.
    """
    columns = codes.shape[1]
    bits, block, height = np.empty(columns, np.uint32), columns // grid.shape[1], out.shape[1] // len(grid)
    values, lift = bits.view(np.float32), np.float32(2.0**120)
    for row in range(first, stop):
        some = codes[row]
        for place in range(columns):
            magnitude = np.uint32(some[place] & np.uint8(0x7F))
            lifted = (magnitude << np.uint32(20)) | (np.uint32(some[place] & np.uint8(0x80)) << np.uint32(24))
            bits[place] = np.uint32(0x7FC00000) if magnitude == np.uint32(0x7F) else lifted
        for state in range(len(states)):
            total = np.float32(0)
            for index in range(grid.shape[1]):
                part, numbers = values[index * block : (index + 1) * block], states[state, index * block : (index + 1) * block]
                inside = np.float32(0)
                for place in range(block):
                    inside += part[place] * lift * numbers[place]
                total += inside * grid[row // height, index]
            out[state, row] = total
