"""bfloat16 without loss in about 0.7 of its bytes: a code of three bits for most exponents, the others listed.

Trained weights use few exponents often: of a normal distribution 98.8% lie in eight that follow each other, so the eight bits
of an exponent become three. A weight [..., rows, columns] is cut into groups of whole rows, and stored as

- `low` uint8 [..., rows, columns]: the sign and the seven bits of the mantissa of each value;
- `codes` uint8 [..., rows, 3/8 columns]: how far each exponent is above the group's lowest. Of the eight equal parts of a row,
  part p has its lower two bits from byte `(p % 2) * columns / 8` on at bit `p // 2 * 2`, its third from `columns / 4` at bit p;
- `groups` int32 [..., groups, 2]: the lowest exponent, and the number of escapes;
- `escapes` uint8 [..., groups, 2, most]: the distances between values whose exponent is another, and that exponent. A value
  further than 255 away is reached over values in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from rabbit_engine.quantization.kernels import can_run, run_rows
from rabbit_engine.quantization.storable import Component
from rabbit_engine.storage.encoding import Described, rows_at_once

_PARTS = 8
_WINDOW = 8
"""Exponents that have a code."""

_GROUP_VALUES = 2**16
_PIECE_VALUES = 2**18
"""Values that torch operations decode together on a CPU: few enough for its caches."""

_VALUE_BYTES = 20
"""What torch's temporaries take for a value."""

_ESCAPE_BYTES = 32
"""What they take for an escape."""

_WORTH = 0.9
"""A weight is stored so if it takes at most this share of its bytes."""


_ESCAPED = 0.0137
"""Of the values of a group, the share of the longest list of escapes: of a normal distribution 0.0122, and a twelfth more for
the differences between groups."""


@dataclass(frozen=True, slots=True)
class Lossless:
    """Components as above; the weight is bfloat16."""

    form: ClassVar[str] = "bfloat16_lossless"
    roles: ClassVar[tuple[str, ...]] = ("low", "codes", "groups", "escapes")
    by_rows: ClassVar[bool] = True

    def parameters(self) -> Mapping[str, int | str]:
        """None."""
        return {}

    def components(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Component]:
        """Raises ValueError for a weight that is not made of bfloat16 matrices whose columns are a multiple of 8."""
        if dtype != torch.bfloat16 or len(shape) < 2 or 0 in shape or shape[-1] % _PARTS:
            raise ValueError(f"a weight of shape {list(shape)} and {dtype} is not a bfloat16 matrix with columns in eighths")
        *stack, rows, columns = shape
        together = _rows_together(rows, columns)
        groups, most = rows // together, 1 + int(_ESCAPED * together * columns)
        return (
            Component(torch.uint8, shape),
            Component(torch.uint8, (*stack, rows, 3 * columns // _PARTS)),
            Component(torch.int32, (*stack, groups, 2)),
            Component(torch.uint8, (*stack, groups, 2, most), varies=True),
        )

    def compress(self, weight: torch.Tensor) -> Sequence[torch.Tensor] | None:
        """None if that gains less than a tenth."""
        self.components(weight.dtype, tuple(weight.shape))
        parts = [_compress(matrix) for matrix in weight.reshape(-1, *weight.shape[-2:])]
        most = max(escapes.shape[-1] for *_, escapes in parts)
        padded = [(*part, functional.pad(escapes, (0, most - escapes.shape[-1]))) for *part, escapes in parts]
        found = [torch.stack(some).view(*weight.shape[:-2], *some[0].shape) for some in zip(*padded, strict=True)]
        return found if sum(tensor.nbytes for tensor in found) <= _WORTH * weight.nbytes else None

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decode the groups, in compiled code or by torch operations."""
        low, codes, groups, escapes = _flat(stored)
        bits = out.view(torch.int16).view(low.shape)
        if can_run(out.device):
            from rabbit_engine.quantization.kernels.lossless import decode_groups

            views = (low.numpy(), codes.numpy(), escapes.numpy(), groups.numpy(), bits.view(torch.uint16).numpy())
            run_rows(decode_groups, len(groups), *views, least=4)
        else:
            _decode(low, codes, groups, escapes, bits)

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """With torch operations what some groups need."""
        if can_run(device):
            return 0
        groups, escapes = (math.prod(stored[index].shape) // 2 for index in (2, 3))
        of_group = math.prod(out.shape) // groups
        at_once = min(groups, rows_at_once(_PIECE_VALUES, of_group, device))
        return at_once * (_VALUE_BYTES * of_group + _ESCAPE_BYTES * escapes // groups)


def _flat(stored: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The components without the dimensions of stacks."""
    low, codes, groups, escapes = stored
    flat = (part.flatten(end_dim=-2) for part in (low, codes, groups))
    return [*flat, escapes.flatten(end_dim=-3)]


def _decode(low: torch.Tensor, codes: torch.Tensor, groups: torch.Tensor, escapes: torch.Tensor, bits: torch.Tensor) -> None:
    rows = len(low) // len(groups)
    at_once = rows_at_once(_PIECE_VALUES, rows * low.shape[1], bits.device)
    for first in range(0, len(groups), at_once):
        some, base = slice(first * rows, (first + at_once) * rows), groups[first : first + at_once, 0]
        exponents = _codes(codes[some]) + base.repeat_interleave(rows)[:, None]
        target = bits[some]
        target.copy_(_bits(low[some].int(), exponents))
        _set_escapes(target.view(len(base), -1), groups[first : first + at_once, 1], escapes[first : first + at_once])


def _codes(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, 3/8 columns] to [rows, columns] of three bits."""
    eighth = packed.shape[1] // 3
    shifts = torch.arange(_PARTS, dtype=torch.uint8, device=packed.device)
    pairs = packed[:, : 2 * eighth].unflatten(1, (1, 2, eighth)) >> shifts[::2].view(-1, 1, 1) & 3
    third = packed[:, 2 * eighth :].unflatten(1, (1, eighth)) >> shifts[:, None] & 1
    codes: torch.Tensor = pairs.reshape(third.shape) | third << 2
    return codes.flatten(1)


def _bits(value: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """bfloat16's bits, int32, of int32 signs and mantissas in eight bits, and exponents."""
    return (exponent & 0xFF) << 7 | value & 0x7F | (value & 0x80) << 8


def _set_escapes(target: torch.Tensor, counts: torch.Tensor, escapes: torch.Tensor) -> None:
    """Set exponents in `target` int16 [groups, values of a group]."""
    positions = escapes[:, 0].long().cumsum(1) - 1
    listed = torch.arange(escapes.shape[2], device=escapes.device) < counts[:, None]
    group, index = torch.nonzero(listed & (positions >= 0) & (positions < target.shape[1]), as_tuple=True)
    position = positions[group, index]
    target[group, position] = target[group, position] & -0x7F81 | (escapes[group, 1, index].int() << 7).to(torch.int16)


def _rows_together(rows: int, columns: int) -> int:
    """The number of rows in each group: the most that divide all rows and are no more than _GROUP_VALUES values."""
    most = max(1, _GROUP_VALUES // columns)
    return max(count for count in range(1, min(rows, most) + 1) if rows % count == 0)


def _compress(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The components of a matrix."""
    rows, columns = matrix.shape
    bits = matrix.contiguous().view(torch.int16)
    exponents = (bits >> 7 & 0xFF).to(torch.uint8).view(rows // _rows_together(rows, columns), -1)
    lowest = _lowest(exponents)
    codes = exponents.int() - lowest[:, None]
    escaped = (codes < 0) | (codes >= _WINDOW)
    packed = _packed(codes.masked_fill(escaped, 0).to(torch.uint8).view(rows, columns))
    counts, escapes = _listed(exponents, escaped)
    low = (bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8)
    return low, packed, torch.stack([lowest, counts], 1).int(), escapes


def _lowest(exponents: torch.Tensor) -> torch.Tensor:
    """For each group the lowest of the eight exponents in a row that are the most frequent together: int32 [groups]."""
    found = []
    for group in exponents:
        counts = torch.bincount(group, minlength=256)
        found.append(counts.unfold(0, _WINDOW, 1).sum(1).argmax())
    return torch.stack(found).int()


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns] of three bits to [rows, 3/8 columns]."""
    rows, columns = codes.shape
    eighth = columns // _PARTS
    found = torch.zeros(rows, 3 * eighth, dtype=torch.uint8)
    for part, code in enumerate(codes.split(eighth, dim=1)):
        found[:, (part % 2) * eighth :][:, :eighth] |= (code & 3) << (2 * (part // 2))
        found[:, 2 * eighth :] |= code >> 2 << part
    return found


def _listed(exponents: torch.Tensor, escaped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of escapes of each group, and uint8 [groups, 2, most] of distances and exponents."""
    group, position = torch.nonzero(escaped, as_tuple=True)
    is_first = torch.ones_like(group, dtype=torch.bool)
    is_first[1:] = group[1:] != group[:-1]
    distance = position - torch.where(is_first, -1, position.roll(1))
    steps = (distance - 1) // 255 + 1
    step_group = group.repeat_interleave(steps)
    ends = steps.cumsum(0)
    steps_of = torch.full_like(step_group, 255)
    steps_of[ends - 1] = distance - 255 * (steps - 1)
    counts = torch.bincount(step_group, minlength=len(exponents))
    most = max(1, int(counts.max()))
    index = torch.arange(len(step_group)) - (counts.cumsum(0) - counts)[step_group]
    escapes = torch.zeros(len(exponents), 2, most, dtype=torch.uint8)
    escapes[step_group, 0, index] = steps_of.to(torch.uint8)
    reached = escapes[:, 0].long().cumsum(1) - 1
    escapes[step_group, 1, index] = exponents[step_group, reached[step_group, index]]
    return counts, escapes
