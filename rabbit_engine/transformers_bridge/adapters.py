"""PEFT adapters on transformers' models."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
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


def is_adapted(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT around one of the model, with a `base_layer`, `active_adapters`, `disable_adapters`,
    `set_adapter` and `enable_adapters`, whose forward calls the base layer's."""
    return _is_of_peft(module) and not hasattr(module, "parameter_name")


def _is_of_peft(module: nn.Module) -> bool:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def without_adapters(module: Any) -> nn.Module:
    """What a layer of PEFT is around, if the adapters that it had were deleted; else the module itself."""
    while _is_of_peft(module) and not any(len(getattr(module, name)) for name in module.adapter_layer_names):
        module = module.base_layer
    return module  # type: ignore[no-any-return]


def state_of(module: Any) -> tuple[tuple[str, ...], bool]:
    """Which adapters of such a layer are active, and whether it uses any."""
    return tuple(module.active_adapters), not module.disable_adapters


def set_state(module: Any, state: tuple[tuple[str, ...], bool]) -> None:
    """Have these adapters of the layer active."""
    active, enabled = state
    module.set_adapter(list(active))
    module.enable_adapters(enabled)


def scaling_of(module: Any) -> tuple[tuple[str, Any], ...]:
    """What the layer multiplies each adapter with, if its kind does."""
    scaling = getattr(module, "scaling", None)
    return tuple(scaling.items()) if isinstance(scaling, dict) else ()
