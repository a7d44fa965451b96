"""The compiled decoder of `quantization/four_bit.py`, for the layouts of torch's product on a CPU."""

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
    first: int, stop: int, codes: Bytes, distance: int, scales: Floats, zeros: Floats, group: int, out: Out
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
