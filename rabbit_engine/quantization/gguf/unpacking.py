"""GGUF's blocks taken apart with torch operations: integers q, and for each group of them a scale a and a minimum c.

The layouts are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). A value is `a * q - c`. Each
function takes blocks uint8 [n, bytes], and a function that rounds scales where each step is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Round = Callable[[torch.Tensor], torch.Tensor]

_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the four-bit codes of IQ4_NL and IQ4_XS stand for."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Blocks as numbers: q int8 [n, values], a and c float32 [n, groups]; c is None without a minimum."""

    q: torch.Tensor
    a: torch.Tensor
    c: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A type of blocks: their bytes, the values in one, and what takes them apart."""

    nbytes: int
    values: int
    unpack: Callable[[torch.Tensor, Round], Unpacked]


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at`: float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(data: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """uint8 [n, m] as fields of `bits` bits: `width` bytes' lowest fields, then their next ones, then the next bytes."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).view(1, 1, -1, 1)
    found: torch.Tensor = (data.view(len(data), -1, 1, width) >> shifts) & (2**bits - 1)
    return found.view(len(data), -1)


def _each(data: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, m] as fields of `bits` bits: all of the first byte, the lowest first, then all of the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    found: torch.Tensor = (data[:, :, None] >> shifts) & (2**bits - 1)
    return found.view(len(data), -1)


def _slice(blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return blocks[:, start:stop].contiguous()


def _signed(values: torch.Tensor, less: int) -> torch.Tensor:
    return values.to(torch.int8) - less


def _levels(codes: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(_LEVELS, dtype=torch.int8, device=codes.device)
    return table.index_select(0, codes.int().view(-1)).view(codes.shape)


def _q4_0(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    return Unpacked(_signed(_fields(_slice(blocks, 2, 18), 4, 16), 8), rounded(_half(blocks, 0)))


def _q4_1(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    q = _fields(_slice(blocks, 4, 20), 4, 16).view(torch.int8)
    return Unpacked(q, rounded(_half(blocks, 0)), rounded(-_half(blocks, 2)))


def _q5_0(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    q = _fields(_slice(blocks, 6, 22), 4, 16) | _each(_slice(blocks, 2, 6), 1) << 4
    return Unpacked(_signed(q, 16), rounded(_half(blocks, 0)))


def _q5_1(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    q = _fields(_slice(blocks, 8, 24), 4, 16) | _each(_slice(blocks, 4, 8), 1) << 4
    return Unpacked(q.view(torch.int8), rounded(_half(blocks, 0)), rounded(-_half(blocks, 2)))


def _q8_0(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    return Unpacked(_slice(blocks, 2, 34).view(torch.int8), rounded(_half(blocks, 0)))


def _q2_k(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    scales, d, low = blocks[:, :16], rounded(_half(blocks, 80)), rounded(_half(blocks, 82))
    q = _fields(_slice(blocks, 16, 80), 2, 32).view(torch.int8)
    return Unpacked(q, rounded(d * (scales & 15)), rounded(low * (scales >> 4)))


def _q3_k(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    scales = _fields(_slice(blocks, 96, 104), 4, 8) | _fields(_slice(blocks, 104, 108), 2, 4) << 4
    borrowed = (_fields(_slice(blocks, 0, 32), 1, 32) ^ 1) << 2
    q = _fields(_slice(blocks, 32, 96), 2, 32).view(torch.int8) - borrowed.view(torch.int8)
    return Unpacked(q, rounded(rounded(_half(blocks, 108)) * _signed(scales, 32)))


def _six_bits(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of Q4_K and Q5_K, float32 [n, 8]: six bits each, in bytes 4 to 16."""
    first, second, rest = (_slice(blocks, at, at + 4) for at in (4, 8, 12))
    scales = torch.cat([first & 63, rest & 15 | first >> 6 << 4], dim=1)
    minima = torch.cat([second & 63, rest >> 4 | second >> 6 << 4], dim=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minima


def _q4_k(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    a, c = _six_bits(blocks)
    return Unpacked(_fields(_slice(blocks, 16, 144), 4, 32).view(torch.int8), rounded(a), rounded(c))


def _q5_k(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    a, c = _six_bits(blocks)
    q = _fields(_slice(blocks, 48, 176), 4, 32) | _fields(_slice(blocks, 16, 48), 1, 32) << 4
    return Unpacked(q.view(torch.int8), rounded(a), rounded(c))


def _q6_k(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    q = _fields(_slice(blocks, 0, 128), 4, 64) | _fields(_slice(blocks, 128, 192), 2, 32) << 4
    return Unpacked(_signed(q, 32), rounded(_half(blocks, 208) * _slice(blocks, 192, 208).view(torch.int8)))


def _iq4_nl(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    return Unpacked(_levels(_fields(_slice(blocks, 2, 18), 4, 16)), rounded(_half(blocks, 0)))


def _iq4_xs(blocks: torch.Tensor, rounded: Round) -> Unpacked:
    scales = _each(_slice(blocks, 4, 8), 4) | _each(_slice(blocks, 2, 4), 2) << 4
    q = _levels(_fields(_slice(blocks, 8, 136), 4, 16))
    return Unpacked(q, rounded(rounded(_half(blocks, 0)) * _signed(scales, 32)))


LAYOUTS: Mapping[str, BlockLayout] = {
    "Q4_0": BlockLayout(18, 32, _q4_0),
    "Q4_1": BlockLayout(20, 32, _q4_1),
    "Q5_0": BlockLayout(22, 32, _q5_0),
    "Q5_1": BlockLayout(24, 32, _q5_1),
    "Q8_0": BlockLayout(34, 32, _q8_0),
    "Q2_K": BlockLayout(84, 256, _q2_k),
    "Q3_K": BlockLayout(110, 256, _q3_k),
    "Q4_K": BlockLayout(144, 256, _q4_k),
    "Q5_K": BlockLayout(176, 256, _q5_k),
    "Q6_K": BlockLayout(210, 256, _q6_k),
    "IQ4_NL": BlockLayout(18, 32, _iq4_nl),
    "IQ4_XS": BlockLayout(136, 256, _iq4_xs),
}
