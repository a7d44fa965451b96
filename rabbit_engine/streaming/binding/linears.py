"""Linear layers that multiply like transformers' own.

With a weight that needs a gradient, as in transformers, `torch.nn.functional.linear` joins the leading dimensions of any
input into the rows of one product. With one that does not, as here, an input whose rows are not contiguous (the last position
of each prompt, which `generate` passes to the head) goes through `bmm`: in bf16 that copies the whole weight, and in float32
it rounds differently.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`states` [..., inputs] times `weight` [outputs, inputs] transposed: [..., outputs], in one matrix product."""
    if states.dim() < 3 or (bias is not None and states.is_contiguous()):
        return functional.linear(states, weight, bias)
    result = functional.linear(states.reshape(-1, states.shape[-1]), weight).view(*states.shape[:-1], -1)
    return result if bias is None else result.add_(bias.to(result.dtype))


def join_rows(model: nn.Module) -> None:
    """Make every linear layer of `model` compute `linear`."""
    for module in model.modules():
        if type(module).forward is nn.Linear.forward:
            module.forward = _joined(module)


def _joined(module: Any) -> Any:
    @functools.wraps(module.forward)
    def forward(input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the parameter's name in torch
        return linear(input, module.weight, module.bias)

    return forward
