"""The compiled decoders of `quantization/four_bit.py`, for strips and for the layouts of torch's product on a CPU.

Values are `(code - 8) * scale + zero`, to the bits of floats.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabbit_engine.quantization.kernels.compiling import kernel
from rabbit_engine.quantization.kernels.floats import put_float

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Out = NDArray[np.uint32] | NDArray[np.uint16] | NDArray[np.int16]


@kernel
def decode_blocks_of_rows(
    first: int, stop: int, codes: Bytes, scales: Floats, zeros: Floats, out: Out, group: int, distance: int
) -> None:
    """Blocks `first` to `stop`: `codes` [blocks, columns, rows of a block / 2], in which a byte holds a row and that `distance`
    further; scales and zeros [rows, groups]; to the bits of floats in `out` [rows, columns].

    Values are `(code - 8) * scale + zero`. Bytes are transposed before they are decoded: there are half as many as values.
    """
    columns, half = codes.shape[1:]
    tile = np.empty((half, group), np.uint8)
    for index in range(first, stop):
        for part in range(columns // group):
            for column in range(group):
                some = codes[index, part * group + column]
                for place in range(half):
                    tile[place, column] = some[place]
            for place in range(half):
                row = index * 2 * half + place // distance * 2 * distance + place % distance
                other, some = row + distance, tile[place]
                scale, zero, target = scales[row, part], zeros[row, part], out[row, part * group : (part + 1) * group]
                for column in range(group):
                    code = np.float32(some[column] & np.uint8(15)) - np.float32(8)
                    put_float(target, column, code * scale + zero)
                scale, zero, target = scales[other, part], zeros[other, part], out[other, part * group : (part + 1) * group]
                for column in range(group):
                    code = np.float32(some[column] >> np.uint8(4)) - np.float32(8)
                    put_float(target, column, code * scale + zero)


@kernel
def decode_strips(first: int, stop: int, codes: Bytes, scales: Floats, zeros: Floats, out: Out, group: int) -> None:
    """Strips `first` to `stop`: `codes` [strips, columns / 8, rows of a strip, 4], whose low bits are four columns and whose high
    bits the next four; scales and zeros [rows, groups]; `out` [rows, columns]."""
    rows, tile = codes.shape[2], np.empty(group, np.uint8)
    for strip in range(first, stop):
        for place in range(rows):
            row = strip * rows + place
            for part in range(scales.shape[1]):
                some = codes[strip, part * group // 8 : (part + 1) * group // 8]
                for eight in range(group // 8):
                    for column in range(4):
                        both = some[eight, place, column]
                        tile[8 * eight + column] = both & np.uint8(15)
                        tile[8 * eight + 4 + column] = both >> np.uint8(4)
                scale, zero, target = scales[row, part], zeros[row, part], out[row, part * group : (part + 1) * group]
                for column in range(group):
                    put_float(target, column, (np.float32(tile[column]) - np.float32(8)) * scale + zero)
