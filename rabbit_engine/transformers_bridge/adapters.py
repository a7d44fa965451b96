"""PEFT adapters on transformers' models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available


def can_load_adapters() -> bool:
    """Whether peft is installed."""
    return bool(is_peft_available())


def has_adapter(model: Any) -> bool:
    """Whether an adapter was loaded into the model, or PEFT wraps it, which puts an adapter's layers into it."""
    loaded = bool(getattr(model, "_hf_peft_config_loaded", False))
    return loaded or any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules())


def remove_adapter(model: PreTrainedModel, name: str) -> None:
    """Remove an adapter, and with the last one every trace: `delete_adapter` may require a newer peft."""
    from peft.functional import delete_adapter

    delete_adapter(model, adapter_name=name, prefix=f"{model.peft_config.pop(name).peft_type.value.lower()}_")
    if not model.peft_config:
        del model.peft_config
        model._hf_peft_config_loaded = False
