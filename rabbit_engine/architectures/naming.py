"""Chooses the class that a checkpoint's config names, or one of an auto class that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from rabbit_engine.architectures.architecture import RawConfig
from rabbit_engine.errors import DamagedCheckpointError, UnsupportedArchitectureError
from rabbit_engine.transformers_bridge.auto_classes import AutoClass, auto_model_classes, class_named, class_names, classes_for

GENERATING: tuple[AutoClass, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
"""The auto classes whose models generate text: of these is the class of a checkpoint that names none."""

_HEADS_WITHOUT_FOR = ("HeadModel", "HeadsModel", "RewardModel", "RewardsModel")
"""Name suffixes of classes with a head whose purpose the name does not state."""

_WRAPPER = "FSDP"
"""The prefix that PyTorch adds to the name of a class that it shards; transformers removes it on saving."""


def named_classes(raw: RawConfig | PretrainedConfig, folder: Path) -> tuple[str, ...]:
    """`architectures` of a config; empty if unset. Raises DamagedCheckpointError if it is not a name or a list of names."""
    named = raw.architectures if isinstance(raw, PretrainedConfig) else raw.get("architectures")
    if named is None:
        return ()
    if isinstance(named, str):
        named = [named]
    if not isinstance(named, (list, tuple)) or not all(isinstance(name, str) and name for name in named):
        raise DamagedCheckpointError(f"{folder / 'config.json'} has architectures={named!r}, expected a list of class names")
    return tuple(named)


def choose_class(config: PretrainedConfig, folder: Path, auto: AutoClass | None = None) -> type[PreTrainedModel]:
    """The class of transformers that `config` names; if it names none, the one that `AutoModelForCausalLM` would build.

    `auto` is the auto class that was asked for: then one of its classes, that which the config names if it is among them.
    Raises UnsupportedArchitectureError if there is none.
    """
    named = named_classes(config, folder)
    offered = _classes(config, GENERATING if auto is None else (auto,))
    found = _named_among(named, offered)
    if found is None and auto is None:
        found = _named_among(named, _classes(config, tuple(auto_model_classes()))) or _made_for(named, config)
    if found is None and offered and (auto is not None or not named):
        return offered[0]
    if found is None:
        raise UnsupportedArchitectureError(_refusal(config, folder, named, offered, auto))
    return found


def _named_among(named: Sequence[str], classes: Sequence[type[PreTrainedModel]]) -> type[PreTrainedModel] | None:
    known = {_plain(cls.__name__): cls for cls in reversed(classes)}
    return next((known[_plain(name)] for name in named if _plain(name) in known), None)


def _made_for(named: Sequence[str], config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The first class that transformers has but lists for no task, such as an encoder alone."""
    return next((cls for name in named if (cls := class_named(name, config)) is not None), None)


def choose_remote(config: PretrainedConfig, folder: Path, auto: AutoClass | None = None) -> str | None:
    """The `auto_map` reference to the checkpoint's own class for `auto`; None if transformers has one, or there is none.

    With no `auto` that is its generating class, or another that the config names. Raises UnsupportedArchitectureError if the
    config names a class for another task.
    """
    auto_map, named = auto_classes(config, folder), named_classes(config, folder)
    if auto is not None:
        return None if classes_for(auto, config) else auto_map.get(auto.__name__)
    reference = _reference(config, auto_map)
    if reference is None or not named or _class_name(reference) in named:
        return reference
    others = {_class_name(other): other for auto, other in auto_map.items() if auto.startswith("AutoModel")}
    if own := next((others[name] for name in named if name in others), None):
        return own
    refused = tuple(name for name in named if _auto_class(name) not in (None, AutoModel, *GENERATING))
    if refused:
        raise UnsupportedArchitectureError(_refusal(config, folder, refused, []))
    return reference


def _reference(config: PretrainedConfig, auto_map: Mapping[str, str]) -> str | None:
    for auto in GENERATING:
        if auto_map.get(auto.__name__):
            return auto_map[auto.__name__]
        if classes_for(auto, config):
            return None
    return None


def names_class(config: PretrainedConfig, folder: Path, cls: type[PreTrainedModel]) -> bool:
    """Whether the config names that class, or none: else the class has a head that the checkpoint may lack."""
    named = named_classes(config, folder)
    return not named or any(_plain(name) == _plain(cls.__name__) for name in named)


def auto_classes(config: PretrainedConfig, folder: Path) -> dict[str, str]:
    """`auto_map` of a config: auto class -> reference to a class of the repository; empty if unset.

    Raises DamagedCheckpointError if it is not such a mapping.
    """
    auto_map: Any = getattr(config, "auto_map", None) or {}
    if not isinstance(auto_map, dict):
        raise DamagedCheckpointError(f"{folder / 'config.json'} has auto_map={auto_map!r}, which does not map classes to code")
    damaged = {auto: found for auto, found in auto_map.items() if auto.startswith("AutoModel") and not isinstance(found, str)}
    if damaged:
        raise DamagedCheckpointError(f"{folder / 'config.json'} has auto_map={damaged!r}, expected the name of a class")
    return auto_map


def _class_name(reference: str) -> str:
    return reference.rpartition(".")[2]


def _plain(name: str) -> str:
    """The name without wrapper and case: repositories capitalise some names differently (MPTForCausalLM, PhiMoEForCausalLM)."""
    return name.removeprefix(_WRAPPER).casefold()


def _classes(config: PretrainedConfig, autos: tuple[AutoClass, ...]) -> list[type[PreTrainedModel]]:
    """The classes that the auto classes register for this config."""
    return [cls for auto in autos for cls in classes_for(auto, config)]


def _refusal(
    config: PretrainedConfig,
    folder: Path,
    named: tuple[str, ...],
    offered: list[type[PreTrainedModel]],
    auto: AutoClass | None = None,
) -> str:
    """Why a checkpoint that names `named` cannot be loaded by `auto`, and what to do; `offered` are the classes for its type."""
    what = f"{folder / 'config.json'} names {', '.join(named)}" if named else f"{folder} is a {config.model_type!r} model"
    if auto is not None:
        others = [other.__name__ for other in auto_model_classes() if classes_for(other, config)]
        has = f"; there is {', '.join(sorted(others))}" if others else ""
        return f"{what}: transformers.{auto.__name__} has no class for model_type {config.model_type!r}{has}{_own_code(config)}"
    if not offered:
        return f"{what}: transformers has no such class for model_type {config.model_type!r}{_own_code(config)}"
    own = offered[0].__name__
    return (
        f"{what}, but model_type {config.model_type!r} builds a {own}, which may lack some of its weights: "
        f'if the checkpoint is a {own}, write "architectures": ["{own}"]{_own_code(config)}'
    )


def _own_code(config: PretrainedConfig) -> str:
    return "; it brings its own code: read it, then pass trust_remote_code=True" if getattr(config, "auto_map", None) else ""


def _auto_class(name: str) -> AutoClass | None:
    """The auto class that lists class `name`, else the one with the same name suffix, else None."""
    autos = auto_model_classes()
    known: list[AutoClass] = [*GENERATING, AutoModelForSeq2SeqLM, *autos]
    listed = next((auto for auto in known if _plain(name) in _names(auto)), None)
    if listed is None and "For" not in name:
        return AutoModel if name.endswith("Model") and not name.endswith(_HEADS_WITHOUT_FOR) else None
    endings = {auto.__name__.removeprefix("AutoModel"): auto for auto in autos if auto is not AutoModel}
    return listed or next((auto for ending, auto in endings.items() if name.endswith(ending)), None)


def _names(auto: AutoClass) -> set[str]:
    """The normalised names of the classes that an auto class lists."""
    return {_plain(name) for name in class_names(auto)}
