"""Builds a model without weights, and initialises those that no checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init


def build_without_weights(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """`cls` as `from_pretrained` builds it, with every parameter on the meta device. `config` becomes the model's own.

    Raises whatever the class does, and ValueError or ImportError for an attention implementation that it does not have.
    """
    keywords: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        model: PreTrainedModel = cls._from_config(config, dtype=dtype, **keywords)
    model.eval()
    return model


def mark_loaded(tensor: torch.Tensor) -> None:
    """Make `initialize_the_rest` leave the values of a parameter or buffer unchanged."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def initialize_the_rest(model: PreTrainedModel) -> None:
    """Fill every parameter and buffer that is not marked as loaded, as the model's class does. Raises whatever it does."""
    model.initialize_weights()
