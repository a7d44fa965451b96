"""The rotary embedding of a model, which sees the positions of every text before the first layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def fixed_frequencies(model: nn.Module) -> Iterator[None]:
    """Make every rotary embedding keep its frequencies within the block: none reads positions, which may have no values."""
    before = [(module, module.rope_type) for module in model.modules() if getattr(module, "rope_type", None) is not None]
    try:
        for module, kind in before:
            vars(module)["rope_type"] = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
        yield
    finally:
        for module, kind in before:
            vars(module)["rope_type"] = kind


def on_positions(model: PreTrainedModel, look: Callable[[torch.Tensor], None]) -> None:
    """Call `look(position ids)`, int64 [batch, queries], before the first layer of every pass; what it raises ends the pass."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    rotary: Any = model.base_model.rotary_emb
    rotary.register_forward_pre_hook(hook, with_kwargs=True)
