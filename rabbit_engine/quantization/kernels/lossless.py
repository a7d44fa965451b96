"""The compiled decoder of `quantization/lossless.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabbit_engine.quantization.kernels.compiling import kernel

Bytes = NDArray[np.uint8]


@kernel
def decode_groups(
    first: int, stop: int, low: Bytes, codes: Bytes, escapes: Bytes, groups: NDArray[np.int32], out: NDArray[np.uint16]
) -> None:
    """Groups `first` to `stop`: `low` [rows, columns], `codes` [rows, 3/8 columns], `escapes` [groups, 2, most],
    `groups` [groups, 2], to the bits of bfloat16 in `out` [rows, columns]. Any bytes are safe to decode."""
    rows = len(low) // len(groups)
    eighth = low.shape[1] // 8
    for group in range(first, stop):
        base = np.uint16(groups[group, 0] & 0xFF)
        for row in range(group * rows, (group + 1) * rows):
            third_bits = codes[row, 2 * eighth :]
            for part in range(8):
                pairs = codes[row, (part % 2) * eighth : (part % 2 + 1) * eighth]
                values = low[row, part * eighth : (part + 1) * eighth]
                target = out[row, part * eighth : (part + 1) * eighth]
                shift, bit = np.uint8(2 * (part // 2)), np.uint8(part)
                for index in range(eighth):
                    code = ((pairs[index] >> shift) & np.uint8(3)) | (((third_bits[index] >> bit) & np.uint8(1)) << np.uint8(2))
                    value = np.uint16(values[index])
                    exponent = (np.uint16(code) + base) & np.uint16(0xFF)
                    sign = (value & np.uint16(0x80)) << np.uint16(8)
                    target[index] = (exponent << np.uint16(7)) | (value & np.uint16(0x7F)) | sign
        flat = out[group * rows : (group + 1) * rows].reshape(-1)
        position = -1
        for index in range(min(max(groups[group, 1], 0), escapes.shape[2])):
            position += escapes[group, 0, index]
            if 0 <= position < len(flat):
                kept = flat[position] & np.uint16(0x807F)
                flat[position] = kept | (np.uint16(escapes[group, 1, index]) << np.uint16(7))
