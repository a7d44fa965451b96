"""A matrix cut by rows: its linear layer computes a block of outputs from each block of rows as it arrives.

Each output is the same sum over the same products; where a kernel orders the sum by the shape of the whole matrix, results
differ from the uncut ones by rounding (docs/architecture.md has the measured bound).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.nn import functional

from rabbit_engine.errors import CannotTrainError
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.streaming.binding.linears import linear
from rabbit_engine.streaming.binding.placeholder import Placeholder

Borrow = Callable[[], AbstractContextManager[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows `first` to `stop` of a matrix; `borrow()` provides them, [stop - first, columns], within its block."""

    first: int
    stop: int
    borrow: Borrow


class LinearBlocks(Placeholder):
    """The weight of a linear layer, [outputs, inputs], in row blocks; `torch.nn.functional.linear` uses them in turn."""

    blocks: Sequence[RowBlock]

    @staticmethod
    def __new__(cls, entry: TensorEntry, device: torch.device, blocks: Sequence[RowBlock]) -> Self:
        """Shape and dtype are the entry's."""
        self = Placeholder.__new__(cls, entry, device)
        self.blocks = blocks
        return self

    def another(self) -> Self:
        """The same blocks."""
        return type(self)(self.entry, self.device, self.blocks)

    def apply(self, states: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`states` [..., inputs] times the transposed matrix: [..., outputs]."""
        if torch.is_grad_enabled() and states.requires_grad:
            raise CannotTrainError(f"{self.weight_name} would record gradients: streamed weights only run forward")
        result: torch.Tensor | None = None
        for block in self.blocks:
            part = None if bias is None else bias[block.first : block.stop]
            with block.borrow() as rows:
                outputs = linear(states, rows, part)
            if result is None:  # in the dtype of the outputs, which autocast may have chosen
                result = outputs.new_empty(*states.shape[:-1], self.shape[0])
            result[..., block.first : block.stop] = outputs
        assert result is not None  # noqa: S101 - a matrix has rows
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handle `linear(states, weight, bias)`; everything else is torch's own."""
        if func is functional.linear and isinstance(args[1], LinearBlocks):
            return args[1].apply(args[0], *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
