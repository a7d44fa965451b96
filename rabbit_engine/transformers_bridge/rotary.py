"""Rotary embeddings that look at the positions of a text, and change their frequencies by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def fixed_frequencies(model: nn.Module) -> Iterator[None]:
    """Let every rotary embedding keep the frequencies it has meanwhile: none looks at positions, which may be without values."""
    before = [(module, module.rope_type) for module in model.modules() if getattr(module, "rope_type", None) is not None]
    try:
        for module, kind in before:
            vars(module)["rope_type"] = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
        yield
    finally:
        for module, kind in before:
            vars(module)["rope_type"] = kind
