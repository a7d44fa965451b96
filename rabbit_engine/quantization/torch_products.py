"""The private operations of torch that multiply by packed integers, and where each of them can be used.

They are present from torch 2.11 to 2.14; tests/test_products.py checks what is relied on. Wrong arguments are not always
reported: the product with eight-bit integers reads past its operands if the columns are not a multiple of 16.
"""

from __future__ import annotations

from functools import cache

import torch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INT8_COLUMNS = 16
"""The columns of a matrix of eight-bit integers must be a multiple of this."""

INT4_ROWS = 16
"""The rows of a matrix of four-bit integers must be a multiple of this."""

INT4_GROUPS = (32, 64, 128, 256)
"""Numbers of values that may share a scale."""


def has_int8(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `int8_product` takes states of `dtype` on `device`."""
    return _has("_weight_int8pack_mm", dtype, device)


def has_int4(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `int4_product` takes states of `dtype` on `device`."""
    return _has("_weight_int4pack_mm_for_cpu", dtype, device)


def _has(operation: str, dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype in _DTYPES and hasattr(torch.ops.aten, operation)


def int8_product(states: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`states` [rows, columns] times the transpose of int8 `values` [outputs, columns], and `scales` [outputs] in the dtype of
    `states`: [rows, outputs]. Sums are in float32."""
    found: torch.Tensor = torch.ops.aten._weight_int8pack_mm(states, values, scales)
    return found


def int4_product(states: torch.Tensor, codes: torch.Tensor, group: int, factors: torch.Tensor) -> torch.Tensor:
    """`states` [rows, columns] times the transpose of a weight [outputs, columns]: [rows, outputs]. Sums are in float32.

    The weight is `(code - 8) * scale + zero` with `factors` [columns / group, outputs, 2] (scale and zero) in the dtype of
    `states`, and `codes` uint8 [outputs, columns / 2] as `int4_codes` packs them on this machine.
    """
    found: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(states.contiguous(), codes, group, factors)
    return found


@cache
def int4_probe() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [80, 2], and the bytes [80, 1] that this machine packs them in: their order depends on the instruction set
    that torch uses. 80 rows have a rest in every arrangement."""
    codes = torch.arange(160, dtype=torch.int32, device="cpu").mul_(7).remainder_(16).view(80, 2)
    codes = codes ^ (torch.arange(80, dtype=torch.int32, device="cpu")[:, None] // 16)
    return codes.to(torch.uint8), torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
