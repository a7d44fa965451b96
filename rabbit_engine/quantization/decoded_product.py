"""The product with an encoded weight where no fused one can be used: decode, then multiply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from rabbit_engine.storage.encoding import Encoding


def decoded_product(
    encoding: Encoding, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]
) -> torch.Tensor:
    """`states` [rows, columns] times the weight of `shape` that `stored` decodes to in their dtype, transposed."""
    weight = torch.empty(*shape, dtype=states.dtype, device=states.device)
    encoding.decode(stored, weight)
    return functional.linear(states, weight)
