"""What a wrapped forward needs, so that no compiler, trace or gradient records weights that come and go."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rabbit_engine.errors import CannotExportError, CannotTrainError


def not_compiled(run: Callable[..., Any], native: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with the name and signature of `native`. A compiler that traces a caller calls it without compiling anything inside.

    Raises CannotExportError if it would be recorded.
    """
    call = torch.compiler.disable(run, reason="streamed weights are not loaded when a compiler looks")

    @functools.wraps(native)
    def forward(*args: object, **kwargs: object) -> Any:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise CannotExportError(
                "a trace would record the current contents of the slots instead of the streamed weights: "
                "make it from transformers.AutoModelForCausalLM"
            )
        return call(*args, **kwargs)  # inside another function: torch.compile(model.forward) undoes the outermost

    return torch.compiler.disable(forward, recursive=False)  # type: ignore[no-any-return]


def refuse_gradients(name: str, module: nn.Module, args: object, kwargs: object) -> None:
    """Raise CannotTrainError if autograd would record a slot that is overwritten later."""
    if not torch.is_grad_enabled():
        return
    if any(tensor.requires_grad for tensor in (*_tensors_in((args, kwargs)), *module.parameters())):
        raise CannotTrainError(
            f"{name} would record gradients: streamed layers only run forward. "
            "Use torch.no_grad(), or train with a model that is loaded whole"
        )


def _tensors_in(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif type(values) in (list, tuple, dict):
        for value in values.values() if type(values) is dict else values:
            yield from _tensors_in(value)


def move(values: Any, device: torch.device) -> Any:
    """Tensors in lists, tuples and dicts, on `device`; other objects (caches, outputs) unchanged."""
    if isinstance(values, torch.Tensor):
        return values.to(device)
    if type(values) is dict:
        return {key: move(value, device) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(move(value, device) for value in values)
    return values
