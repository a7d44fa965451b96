"""The classes that transformers' auto classes have for a config, and their names."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

AutoClass = type[Any]
"""`transformers.AutoModel`, `AutoModelForCausalLM` and so on: their base class is private."""


def auto_model_classes() -> list[AutoClass]:
    """Every auto class for models in the installed transformers."""
    return [getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModel")]


def classes_for(auto: AutoClass, config: PretrainedConfig) -> list[type[PreTrainedModel]]:
    """The classes that `auto` builds for a config, the default first; empty if it has none."""
    if type(config) not in auto._model_mapping:
        return []
    found = auto._model_mapping[type(config)]
    return list(found) if isinstance(found, (list, tuple)) else [found]


def class_names(auto: AutoClass) -> list[str]:
    """The names of all classes that `auto` builds, without importing them."""
    mapping = getattr(auto, "_model_mapping", None)  # an alias of a removed class may have none
    named = mapping._model_mapping.values() if mapping is not None else ()
    return [name for item in named for name in ((item,) if isinstance(item, str) else item)]


def auto_class(name: str) -> AutoClass:
    """`transformers.<name>`, such as "AutoModelForMaskedLM"."""
    found: AutoClass = getattr(transformers, name)
    return found


def class_named(name: str, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The model class of that name which is made for the config, also if no auto class lists it; None if there is none."""
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        return None
    return found if found.config_class is type(config) else None
