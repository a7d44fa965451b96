"""Operations on tensors without values: each is inferred once for each kind of operands."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload


class RememberedResults:
    """What operations give on the meta device. Layers are alike, and an operation takes 100 us where torch infers its result
    in Python."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}

    def run(self, operation: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, list[torch.Tensor]]:
        """The operation's result, and the tensors among its operands."""
        operands: list[torch.Tensor] = []
        key = (operation, described(args, operands), described(tuple(kwargs.items()), operands))
        if is_alias(operation):
            return operation(*args, **kwargs), operands
        known = self._known.get(key) if all(tensor.is_meta for tensor in operands) else None
        if known is not None:
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta"), operands
        result = operation(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.is_meta:
            self._known[key] = (result.shape, result.stride(), result.dtype)
        return result, operands


def described(value: object, tensors: list[torch.Tensor]) -> Hashable:
    """Everything in an operand that a result without values depends on. Its tensors are added to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(described(item, tensors) for item in value)
    return type(value), value  # True and 1 and 1.0 are equal


@functools.cache
def is_alias(operation: OpOverload) -> bool:
    """Whether it returns memory that it was given."""
    return any(returned.alias_info is not None for returned in operation._schema.returns)
