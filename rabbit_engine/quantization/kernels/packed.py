"""Kernels that decode bitsandbytes' blocks, and the packed integers of GPTQ, AWQ and compressed-tensors.

All write the bits of values: float32 as uint32, bfloat16 as uint16, float16 as int16. Scales and zero points are float32. A value
is rounded to the dtype of `first_to`, an empty array, unless it is None, and then to that of `out`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rabbit_engine.quantization.kernels.compiling import kernel, part
from rabbit_engine.quantization.kernels.floats import put_float, rounded

Bytes = NDArray[np.uint8]
Words = NDArray[np.int32]
Floats = NDArray[np.float32]
Out = NDArray[np.uint32] | NDArray[np.uint16] | NDArray[np.int16]

_LOW = np.int32(15)

_INPUTS, TILE_OUTPUTS = 32, 256
"""A tile of a transposed weight, which is decoded in a processor's nearest cache."""


@kernel
def decode_blocks(first: int, stop: int, codes: Bytes, absmax: Floats, pairs: NDArray[np.uint64], block: int, out: Out) -> None:
    """Blocks `first` to `stop`, the last of which may be short: `codes` [n / 2], and `pairs` [256], the bits of the two float32
    that a byte stands for."""
    bits = np.empty(block // 2, np.uint64)
    values = bits.view(np.float32)
    for index in range(first, stop):
        start = index * block // 2
        some, scale = codes[start : start + block // 2], absmax[index]
        for place in range(len(some)):
            bits[place] = pairs[some[place]]
        target = out[2 * start : 2 * (start + len(some))]
        for place in range(len(target)):
            put_float(target, place, values[place] * scale)


@part
def _put(target: Any, place: int, value: Any, first_to: Out | None) -> None:
    if first_to is not None:  # a kernel is compiled for each
        value = rounded(value, first_to)
    put_float(target, place, value)


@part
def _put_row(target: Any, words: Words, shift: Any, mask: Any, zeros: Floats, scales: Floats, first_to: Out | None) -> None:
    """Write the values of one input, all [outputs]: the bits of each word from `shift` on."""
    for place in range(len(words)):
        code = np.float32(words[place] >> shift & mask)
        _put(target, place, np.float32((code - zeros[place]) * scales[place]), first_to)


@part
def _put_tile(out: Out, first_output: int, first_input: int, tile: Any, outputs: int, inputs: int) -> None:
    """Write a tile [inputs, outputs], transposed."""
    for output in range(outputs):
        target = out[first_output + output, first_input : first_input + inputs]
        for place in range(inputs):
            target[place] = tile[place, output]


@kernel
def decode_gptq(
    first: int,
    stop: int,
    words: Words,
    zeros: Floats,
    scales: Floats,
    groups: NDArray[np.int32],
    bits: int,
    first_to: Out | None,
    out: Out,
) -> None:
    """Tiles `first` to `stop` of outputs: `words` [inputs * bits / 32, outputs], zeros and scales [groups, outputs], `groups`
    [inputs]."""
    inputs, mask, per_word = len(groups), np.int32((1 << bits) - 1), 32 // bits
    tile = np.empty((_INPUTS, TILE_OUTPUTS), out.dtype)
    for start in range(first * TILE_OUTPUTS, min(stop * TILE_OUTPUTS, words.shape[1]), TILE_OUTPUTS):
        end = min(start + TILE_OUTPUTS, words.shape[1])
        for top in range(0, inputs, _INPUTS):
            count = min(_INPUTS, inputs - top)
            for row in range(count):
                word, shift, group = (top + row) // per_word, np.int32((top + row) % per_word * bits), groups[top + row]
                _put_row(
                    tile[row], words[word, start:end], shift, mask, zeros[group, start:end], scales[group, start:end], first_to
                )
            _put_tile(out, start, top, tile, end - start, count)


@kernel
def decode_awq(
    first: int, stop: int, words: Words, zeros: Floats, scales: Floats, size: int, first_to: Out | None, out: Out
) -> None:
    """Tiles `first` to `stop` of words: `words` [inputs, outputs / 8], zeros and scales [groups, 8, outputs / 8], for the places
    of outputs in their eight; groups of `size` inputs."""
    tile, step = np.empty((_INPUTS, TILE_OUTPUTS), out.dtype), TILE_OUTPUTS // 8
    for start in range(first * step, min(stop * step, words.shape[1]), step):
        end = min(start + step, words.shape[1])
        for top in range(0, len(words), _INPUTS):
            count = min(_INPUTS, len(words) - top)
            for row in range(count):
                some, group = words[top + row, start:end], (top + row) // size
                for place in range(8):
                    shift, column = np.int32(place // 2 * 4 + place % 2 * 16), place * step
                    target = tile[row, column : column + end - start]
                    _put_row(target, some, shift, _LOW, zeros[group, place, start:end], scales[group, place, start:end], first_to)
            for place in range(8):
                for word in range(end - start):
                    target = out[8 * (start + word) + place, top : top + count]
                    for row in range(count):
                        target[row] = tile[row, place * step + word]


@kernel
def decode_nibbles(
    first: int, stop: int, codes: Bytes, zeros: Floats, scales: Floats, size: int, first_to: Out | None, out: Out
) -> None:
    """Rows `first` to `stop`: `codes` [rows, columns / 2], low bits first, zeros and scales [rows, groups], groups of `size`."""
    for row in range(first, stop):
        for group in range(scales.shape[1]):
            zero, scale = zeros[row, group], scales[row, group]
            some = codes[row, group * size // 2 : (group + 1) * size // 2]
            target = out[row, group * size : group * size + 2 * len(some)]
            for place in range(len(some)):
                low, high = np.float32(some[place] & np.uint8(15)), np.float32(some[place] >> np.uint8(4))
                _put(target, 2 * place, np.float32((low - zero) * scale), first_to)
                _put(target, 2 * place + 1, np.float32((high - zero) * scale), first_to)
