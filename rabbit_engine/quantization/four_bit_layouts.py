"""How four-bit codes are arranged in bytes: by rows, or as torch's product on a CPU reads them with an instruction set.

torch cuts a matrix into blocks of rows. A block holds, column after column, a byte for every two of its rows, the first of
them in the low bits: rows 0 and 32, 1 and 33 ... with AVX512, rows 0 and 16 ... with AVX2, rows 0 and 1, 2 and 3 ... without
either. The rows that are left over, a multiple of 16, are one smaller block of the last arrangement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from rabbit_engine.quantization import torch_products

BY_ROWS = "rows"
"""A byte holds two neighbouring columns of a row, the first of them in the low bits."""

_BLOCKS = {"avx512": (64, 32), "avx2": (32, 16), "default": (32, 1)}
"""layout -> rows of a block, and the distance of two rows that share a byte."""

LAYOUTS = (BY_ROWS, *_BLOCKS)


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
    native = native_layout() if device_type == "cpu" else None
    return native if native is not None and rows % torch_products.INT4_ROWS == 0 else BY_ROWS


@cache
def native_layout() -> str | None:
    """The layout that torch's product reads on this machine; None if there is no such product, or its layout is unknown."""
    if not torch_products.has_int4(torch.bfloat16, torch.device("cpu")):
        return None
    codes, wanted = torch_products.int4_probe()
    return next((layout for layout in _BLOCKS if torch.equal(pack(codes, layout), wanted)), None)


def pack(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """Codes from 0 to 15, uint8 [rows, columns], as bytes [rows, columns / 2]."""
    if layout == BY_ROWS:
        return codes[:, 0::2] | codes[:, 1::2] << 4
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
    for region in regions(len(out), layout):
        stored, rows = region.bytes_of(packed).permute(0, 2, 3, 1), region.rows_of(out)
        rows[:, :, 0], rows[:, :, 1] = stored & 0xF, stored >> 4
