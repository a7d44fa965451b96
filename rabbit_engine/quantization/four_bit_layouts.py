"""How four-bit codes and the factors of their groups are arranged: by rows, in strips, or as torch's product on a CPU reads them
with an instruction set.

Strips are of 16 rows, what a kernel of this library multiplies at once. A strip's bytes hold eight columns at a time, and of
those four bytes for every row: the first four columns in the low bits, the others in the high bits.

torch cuts a matrix into blocks of rows. A block holds, column after column, a byte for every two of its rows, the first of
them in the low bits: rows 0 and 32, 1 and 33 ... with AVX512, rows 0 and 16 ... with AVX2, rows 0 and 1, 2 and 3 ... without
either. The rows that are left over, a multiple of 16, are one smaller block of the last arrangement.

A group's scale and zero are neighbours. Those of the rows of a strip follow each other in strips; else those of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from rabbit_engine.quantization import kernels, torch_products

BY_ROWS = "rows"
"""A byte holds two neighbouring columns of a row, the first of them in the low bits."""

STRIPS = "strips"
"""The arrangement of `kernels/four_bit_products.py`."""

STRIP_ROWS = 16
"""All arrangements but that by rows are of a multiple of this many rows."""

_BLOCKS = {"avx512": (64, 32), "avx2": (32, 16), "default": (32, 1)}
"""layout -> rows of a block, and the distance of two rows that share a byte."""

LAYOUTS = (BY_ROWS, STRIPS, *_BLOCKS)


@dataclass(frozen=True, slots=True)
class Region:
    """Rows `first` to `stop` of a matrix: blocks of `block` rows, in which rows share a byte with those `distance` further."""

    first: int
    stop: int
    block: int
    distance: int

    def bytes_of(self, packed: torch.Tensor) -> torch.Tensor:
        """A view of its bytes in those of a matrix [rows, columns / 2]: [blocks, columns, pairs of strips, distance]."""
        columns = packed.shape[1] * 2
        return packed[self.first : self.stop].view(-1, columns, self.block // (2 * self.distance), self.distance)

    def rows_of(self, matrix: torch.Tensor) -> torch.Tensor:
        """A view of its rows of a matrix [rows, columns]: [blocks, pairs of strips, 2, distance, columns]."""
        return matrix[self.first : self.stop].view(-1, self.block // (2 * self.distance), 2, self.distance, matrix.shape[1])


def regions(rows: int, layout: str) -> Iterator[Region]:
    """The regions of a matrix of `rows` rows in one of torch's layouts."""
    block, distance = _BLOCKS[layout]
    whole = rows - rows % block
    if whole:
        yield Region(0, whole, block, distance)
    if whole < rows:
        yield Region(whole, rows, rows - whole, 1)


def layout_for(rows: int, device_type: str) -> str:
    """The layout in which a matrix of `rows` rows is multiplied on a device of that type; by rows if it is decoded first."""
    if device_type != "cpu" or rows % STRIP_ROWS:
        return BY_ROWS
    return STRIPS if can_multiply_strips() else torch_layout() or BY_ROWS


def can_multiply(layout: str) -> bool:
    """Whether this machine's CPU multiplies by codes in `layout`, or must decode them."""
    return can_multiply_strips() if layout == STRIPS else layout == torch_layout()


def can_multiply_strips() -> bool:
    """Whether the kernel for strips runs here."""
    return kernels.can_run(torch.device("cpu")) and _has_instructions()


@cache
def _has_instructions() -> bool:
    from rabbit_engine.quantization.kernels.vectors import can_multiply_bytes

    return can_multiply_bytes()


@cache
def torch_layout() -> str | None:
    """The layout that torch's product reads on this machine; None if there is no such product, or its layout is unknown."""
    if not torch_products.has_int4(torch.bfloat16, torch.device("cpu")):
        return None
    codes, wanted = torch_products.int4_probe()
    return next((layout for layout in _BLOCKS if torch.equal(pack(codes, layout), wanted)), None)


def factor_shape(rows: int, groups: int, layout: str) -> tuple[int, ...]:
    """The shape in which the scales and zeros of a matrix are stored."""
    return (rows // STRIP_ROWS, groups, STRIP_ROWS, 2) if layout == STRIPS else (groups, rows, 2)


def factors_of_rows(factors: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """A view [rows, groups, 2], or [strips, rows of a strip, groups, 2], of the stored factors of some rows of a matrix."""
    if factors.dim() == 3:
        return factors[:, first:stop].transpose(0, 1)
    return factors[first // STRIP_ROWS : -(-stop // STRIP_ROWS)].transpose(1, 2)


def pack(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """Codes from 0 to 15, uint8 [rows, columns], as bytes [rows, columns / 2]."""
    if layout == BY_ROWS:
        return codes[:, 0::2] | codes[:, 1::2] << 4
    if layout == STRIPS:
        eights = _eight_columns(codes)
        return (eights[..., 0, :] | eights[..., 1, :] << 4).transpose(1, 2).reshape(len(codes), -1)
    packed = torch.empty(len(codes), codes.shape[1] // 2, dtype=torch.uint8, device=codes.device)
    for region in regions(len(codes), layout):
        rows = region.rows_of(codes)
        region.bytes_of(packed).copy_((rows[:, :, 0] | rows[:, :, 1] << 4).permute(0, 3, 1, 2))
    return packed


def unpack(packed: torch.Tensor, layout: str, out: torch.Tensor) -> None:
    """Write the codes of bytes [rows, columns / 2] to `out` [rows, columns], of any dtype."""
    if layout == BY_ROWS:
        out[:, 0::2], out[:, 1::2] = packed & 0xF, packed >> 4
        return
    if layout == STRIPS:
        stored, eights = packed.view(-1, out.shape[1] // 8, STRIP_ROWS, 4).transpose(1, 2), _eight_columns(out)
        eights[..., 0, :], eights[..., 1, :] = stored & 0xF, stored >> 4
        return
    for region in regions(len(out), layout):
        stored, rows = region.bytes_of(packed).permute(0, 2, 3, 1), region.rows_of(out)
        rows[:, :, 0], rows[:, :, 1] = stored & 0xF, stored >> 4


def _eight_columns(matrix: torch.Tensor) -> torch.Tensor:
    """A view of a matrix [rows, columns]: [strips, rows of a strip, eights of columns, 2, 4]."""
    return matrix.view(-1, STRIP_ROWS, matrix.shape[1] // 8, 2, 4)
