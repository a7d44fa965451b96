"""Kernels that multiply states of eight bits by four-bit codes, in strips of 16 rows; see `quantization/four_bit.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabbit_engine.quantization.kernels.compiling import kernel, part
from rabbit_engine.quantization.kernels.vectors import (
    add_product,
    add_scaled,
    all_integers,
    high_nibbles,
    load,
    load_pairs,
    low_nibbles,
    multiply_add,
    no_floats,
    store,
)

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Int32 = NDArray[np.int32]
Bits = NDArray[np.uint32] | NDArray[np.uint16] | NDArray[np.int16]

_MOST = 127


@kernel
def round_states(first: int, stop: int, states: Floats, codes: NDArray[np.int8], scales: Floats, sums: Int32) -> None:
    """Rows `first` to `stop` of `states` [rows, columns] as `codes` times the scale of each group, [rows, groups], and the sums
    of a group's codes. A group with a value that is not finite has a scale that is not either, and codes of 0."""
    groups = scales.shape[1]
    size = states.shape[1] // groups
    for row in range(first, stop):
        for group in range(groups):
            values, rounded = states[row, group * size : (group + 1) * size], codes[row, group * size : (group + 1) * size]
            most = np.float32(0)
            for place in range(size):
                value = np.abs(values[place])
                if value > most or np.isnan(value):  # nothing is greater than NaN: it stays
                    most = value
            inverse = np.float32(_MOST) / most
            if not (inverse < np.inf and inverse > 0):
                inverse = np.float32(0)
            total = np.int32(0)
            for place in range(size):
                code = np.int32(np.rint(values[place] * inverse)) if inverse > 0 else np.int32(0)
                rounded[place] = np.int8(code)
                total += code
            scales[row, group] = most / np.float32(_MOST)
            sums[row, group] = total


@part
def _multiply_one(
    codes: Bytes, factors: Bits, steps: int, fours: Int32, scales: Floats, sums: Int32, out: Floats, row: int
) -> None:
    total, place = no_floats(), np.intp(0)
    for group in range(len(scales)):
        whole = all_integers(np.int32(-8) * sums[group])
        for step in range(group * steps, (group + 1) * steps):
            some = load(codes, place)
            whole = multiply_add(multiply_add(whole, low_nibbles(some), fours[2 * step]), high_nibbles(some), fours[2 * step + 1])
            place += 64
        scale, zero = load_pairs(factors, np.intp(32 * group))
        total = add_product(total, scale, whole, scales[group])
        total = add_scaled(total, zero, scales[group] * np.float32(sums[group]))
    store(total, out, np.intp(row))


@part
def _multiply_four(
    codes: Bytes, factors: Bits, steps: int, fours: Int32, scales: Floats, sums: Int32, out: Floats, row: int
) -> None:
    """As `_multiply_one` with four states, so that codes are loaded and unpacked once for all of them."""
    a, b, c, d, place = no_floats(), no_floats(), no_floats(), no_floats(), np.intp(0)
    for group in range(scales.shape[1]):
        whole_a, whole_b = all_integers(np.int32(-8) * sums[0, group]), all_integers(np.int32(-8) * sums[1, group])
        whole_c, whole_d = all_integers(np.int32(-8) * sums[2, group]), all_integers(np.int32(-8) * sums[3, group])
        for step in range(group * steps, (group + 1) * steps):
            some, first, second = load(codes, place), 2 * step, 2 * step + 1
            low, high = low_nibbles(some), high_nibbles(some)
            whole_a = multiply_add(multiply_add(whole_a, low, fours[0, first]), high, fours[0, second])
            whole_b = multiply_add(multiply_add(whole_b, low, fours[1, first]), high, fours[1, second])
            whole_c = multiply_add(multiply_add(whole_c, low, fours[2, first]), high, fours[2, second])
            whole_d = multiply_add(multiply_add(whole_d, low, fours[3, first]), high, fours[3, second])
            place += 64
        scale, zero = load_pairs(factors, np.intp(32 * group))
        a = add_scaled(add_product(a, scale, whole_a, scales[0, group]), zero, scales[0, group] * np.float32(sums[0, group]))
        b = add_scaled(add_product(b, scale, whole_b, scales[1, group]), zero, scales[1, group] * np.float32(sums[1, group]))
        c = add_scaled(add_product(c, scale, whole_c, scales[2, group]), zero, scales[2, group] * np.float32(sums[2, group]))
        d = add_scaled(add_product(d, scale, whole_d, scales[3, group]), zero, scales[3, group] * np.float32(sums[3, group]))
    store(a, out[0], np.intp(row))
    store(b, out[1], np.intp(row))
    store(c, out[2], np.intp(row))
    store(d, out[3], np.intp(row))


@kernel
def multiply_strips(
    first: int, stop: int, codes: Bytes, factors: Bits, fours: Int32, scales: Floats, sums: Int32, out: Floats
) -> None:
    """Strips `first` to `stop` of `codes` [strips, columns * 8] and `factors` [strips, groups * 32] times rounded states: four
    codes in each of `fours` [states, columns / 4], `scales` and `sums` [states, groups]; to `out` [states, rows].

    64 bytes of codes are eight columns: the four bytes of a row hold the first four in their low bits, the others in the high.
    """
    states, groups = scales.shape
    steps = codes.shape[1] // (64 * groups)
    for strip in range(first, stop):
        some, pairs, state = codes[strip], factors[strip], 0
        while state + 4 <= states:
            rows = slice(state, state + 4)
            _multiply_four(some, pairs, steps, fours[rows], scales[rows], sums[rows], out[rows], 16 * strip)
            state += 4
        while state < states:
            _multiply_one(some, pairs, steps, fours[state], scales[state], sums[state], out[state], 16 * strip)
            state += 1
