"""Chooses the class that a checkpoint's config names, if it is supported: one that generates text, or one that embeds it."""

from __future__ import annotations

from collections.abc import Mapping
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
from rabbit_engine.transformers_bridge.auto_classes import AutoClass, auto_model_classes, class_names, classes_for

GENERATING: tuple[AutoClass, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
"""The auto classes whose models are supported."""

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


def choose_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """The class of transformers that `config` names; if it names none, the one that `AutoModelForCausalLM` would build.

    A class without a head is supported if the checkpoint has the files of sentence-transformers. Raises
    UnsupportedArchitectureError for any other class: it would run without its head, or with random weights.
    """
    named, generating = named_classes(config, folder), _classes(config, GENERATING)
    if not named and generating:
        return generating[0]
    embedding = _classes(config, (AutoModel,)) if (folder / "modules.json").is_file() else []
    known = {_plain(cls.__name__): cls for cls in (*embedding, *reversed(generating))}
    found = next((known[_plain(name)] for name in named if _plain(name) in known), None)
    if found is None:
        raise UnsupportedArchitectureError(_refusal(config, folder, named, generating))
    return found


def choose_remote(config: PretrainedConfig, folder: Path) -> str | None:
    """The `auto_map` reference to the checkpoint's own generating class; None if transformers has one, or there is none.

    Raises UnsupportedArchitectureError if the config names another of its classes, or one for another task.
    """
    auto_map, named = auto_classes(config, folder), named_classes(config, folder)
    reference = _reference(config, auto_map)
    if reference is None or not named or _class_name(reference) in named:
        return reference
    others = {_class_name(other) for auto, other in auto_map.items() if auto.startswith("AutoModel")}
    refused = tuple(name for name in named if name in others or _auto_class(name) not in (None, AutoModel, *GENERATING))
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


def _refusal(config: PretrainedConfig, folder: Path, named: tuple[str, ...], generating: list[type[PreTrainedModel]]) -> str:
    """Why a checkpoint that names `named` is not supported, and what to do; `generating` are the classes for its model type."""
    what = f"{folder / 'config.json'} names {', '.join(named)}" if named else f"{folder} is a {config.model_type!r} model"
    name, auto = next(((name, auto) for name in named if (auto := _auto_class(name))), ("", None))
    if auto is AutoModel:
        return (
            f"{what}, a model without a head: it runs if the files of sentence-transformers (modules.json) are next to it; "
            "without them it is not supported yet: use transformers.AutoModel"
        )
    if auto is not None and auto not in GENERATING:
        return (
            f"{what}, a class of transformers.{auto.__name__}: this version runs classes that generate text, {name} and its head "
            "are not supported yet"
        )
    if not generating:
        return f"{what}: transformers has no generating class for model_type {config.model_type!r}{_own_code(config)}"
    own = generating[0].__name__
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
