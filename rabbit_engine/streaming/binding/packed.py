"""A weight in the form it is stored in: its linear layer multiplies by that, or by the decoded weight for many rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, cast

import torch
from torch.nn import functional

from rabbit_engine.storage.encoding import Product
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.streaming.binding.linears import linear
from rabbit_engine.streaming.binding.placeholder import Placeholder

Decoded = Callable[[], AbstractContextManager[torch.Tensor]]
"""Provides a decoded weight within a block."""


class PackedWeight(Placeholder):
    """The weight of a linear layer, [outputs, inputs], whose components are `stored`; `functional.linear` uses them."""

    stored: Sequence[torch.Tensor]
    decoded: Decoded
    product: Product
    advice = "its module multiplies by the stored form: pass fused_products=False for a decoded weight"

    @staticmethod
    def __new__(
        cls, entry: TensorEntry, device: torch.device, shape: Sequence[int], stored: Sequence[torch.Tensor], decoded: Decoded
    ) -> Self:
        """`shape` is the weight's; the entry may have more dimensions, of 1. Its encoding is a `Product`."""
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=entry.dtype, device=device)
        self.entry, self.stored, self.decoded = entry, stored, decoded
        self.product = cast(Product, entry.encoding)  # not checked here: that takes as long as a small product
        return self

    def another(self) -> Self:
        """The same weight."""
        return type(self)(self.entry, self.device, self.shape, self.stored, self.decoded)

    def apply(self, states: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`states` [..., inputs] times the transposed matrix: [..., outputs]."""
        columns = states.shape[-1]
        rows = states.numel() // max(1, columns)
        fits = columns == self.shape[1] and states.dtype == self.dtype and not torch.is_autocast_enabled(states.device.type)
        if not fits or not self.product.gains(rows, states.dtype, states.device):
            with self.decoded() as weight:
                return linear(states, weight, bias)
        result = self.product.linear(states.reshape(rows, columns), self.stored, self.shape).view(
            *states.shape[:-1], self.shape[0]
        )
        return result if bias is None else result + bias

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handle `linear(states, weight, bias)`; everything else is torch's own."""
        if func is functional.linear and isinstance(args[1], PackedWeight):
            return args[1].apply(args[0], *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def multiplies_packed(entry: TensorEntry, fused: bool | None) -> bool:
    """Whether a linear layer multiplies by the weight's stored form: `fused` says it, or None leaves it to the encoding."""
    product = entry.encoding
    return isinstance(product, Product) and (product.fused_by_default if fused is None else fused)
