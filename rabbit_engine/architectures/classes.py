"""Finds the architecture of a model from its folder's config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures.architecture import Architecture, Family, RawConfig
from rabbit_engine.architectures.building import config_for
from rabbit_engine.architectures.configfile import read_config
from rabbit_engine.architectures.faulty_key import faulty_key_of_config
from rabbit_engine.architectures.gguf_config import GgufConfigFile
from rabbit_engine.architectures.naming import choose_class, choose_remote, named_classes, names_class
from rabbit_engine.architectures.overrides import ConfigOverrides, override
from rabbit_engine.architectures.registry import find_family
from rabbit_engine.architectures.remote import misfit, written_for
from rabbit_engine.errors import (
    CompressionUnavailableError,
    ConfigurationError,
    DamagedCheckpointError,
    MissingExtraError,
    RabbitError,
    UnsupportedArchitectureError,
    first_line,
)
from rabbit_engine.transformers_bridge.auto_classes import auto_class
from rabbit_engine.transformers_bridge.quantizers import FORMATS, PACKED_METHODS, method_of
from rabbit_engine.transformers_bridge.remote_code import as_generating_class, import_class
from rabbit_engine.utils.extras import missing_extra
from rabbit_engine.utils.foreign import foreign_code
from rabbit_engine.utils.keywords import refuse_unknown

logger = logging.getLogger(__name__)

_DEQUANTIZED = (*(found.method for found in FORMATS), *PACKED_METHODS)

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def find_architecture(folder: Path, given: ConfigOverrides, *, gguf: GgufConfigFile | None = None) -> Architecture:
    """The architecture of the checkpoint in `folder`, or of its GGUF file: a converted family, or a class of transformers or of
    its own code.

    Raises CheckpointNotFoundError (no config.json), DamagedCheckpointError (it cannot be read), UnsupportedArchitectureError (no
    class for it, or it needs code that was not allowed), MissingExtraError (GGUF without the package),
    CompressionUnavailableError (quantised), or UnknownKeywordError for an override that is not an attribute of the config.
    """
    alone = gguf is not None or (given.config is not None and not (folder / "config.json").is_file())
    raw = {} if alone else read_config(folder)
    named_classes(raw, folder)
    family = find_family(raw)
    if family is not None:
        _require_causal(family, given.auto)
        return _with_overrides(_converted(family, raw, folder), given)
    config = _find_config(folder, raw, gguf, given) if given.config is None else _given_config(raw, given)
    quantization = _take_quantization(folder, config)
    cls = _find_class(config, folder, given)
    return Architecture(
        cls=cls,
        config=config_for(cls, config),
        quantization=quantization,
        transforms=given.renamings(),
        new_head=given.auto is not None and not names_class(config, folder, cls),
    )


def _require_causal(family: Family, auto: str | None) -> None:
    """Raise UnsupportedArchitectureError if another class than a causal model is asked for."""
    if auto not in (None, "AutoModelForCausalLM"):
        raise UnsupportedArchitectureError(
            f"{family.name} is converted to {family.becomes}, a causal language model: {auto} has no class for it; "
            "load it with AutoModelForCausalLM"
        )


def _with_overrides(architecture: Architecture, given: ConfigOverrides) -> Architecture:
    """A converted family's architecture with the caller's overrides."""
    if given.config is not None:
        raise ConfigurationError(
            f"config= cannot replace the config of {architecture.family}, which is converted to {architecture.cls.__name__}: "
            "pass its attributes as keywords"
        )
    config, unknown = override(architecture.config, given.overrides)
    refuse_unknown(unknown, vars(config))
    return replace(architecture, config=config, transforms=(*given.renamings(), *architecture.transforms))


def _given_config(raw: RawConfig, given: ConfigOverrides) -> PretrainedConfig:
    """A copy of the caller's config; if it names no class, with the class that the checkpoint names."""
    assert given.config is not None  # noqa: S101 - checked by the caller
    config, unknown = override(given.config, given.overrides)
    refuse_unknown(unknown, vars(config))
    if not config.architectures and config.model_type == raw.get("model_type"):
        config.architectures = raw.get("architectures")
    return config


def _converted(family: Family, raw: RawConfig, folder: Path) -> Architecture:
    _refuse_quantized(folder, raw.get("quantization_config"))
    with foreign_code(partial(_not_of_family, family.name, folder)):
        architecture = replace(family.convert(raw, folder), family=family.name, tokenizer=family.tokenizer)
    logger.info("%s is a %s model: converted to %s, none of its own code runs", folder, family.name, architecture.cls.__name__)
    return architecture


def _not_of_family(family: str, folder: Path, error: Exception) -> RabbitError:
    if isinstance(error, KeyError):
        return UnsupportedArchitectureError(f"{folder}/config.json is a {family} config and lacks {error}")
    return UnsupportedArchitectureError(f"{folder}/config.json is not a valid {family} config: {first_line(error)}")


def _find_config(folder: Path, raw: RawConfig, gguf: GgufConfigFile | None, given: ConfigOverrides) -> PretrainedConfig:
    """The checkpoint's config with the caller's overrides, as transformers reads it."""

    def told(error: Exception) -> RabbitError:
        if isinstance(error, ImportError):
            return _import_failed(folder, raw, gguf, error)
        return UnsupportedArchitectureError(_unsupported(folder, raw, gguf, error, given.trust_remote_code))

    with foreign_code(told):
        with nullcontext(folder) if gguf is None else gguf.as_folder() as place:
            config, unused = AutoConfig.from_pretrained(
                place,
                trust_remote_code=given.trust_remote_code,
                code_revision=given.code_revision,
                return_unused_kwargs=True,
                **given.overrides,
            )
        config.name_or_path = str(folder)
        config.get_text_config(decoder=True)
    _require_default_weights(config, folder)
    refuse_unknown([name for name in unused if name in given.overrides], vars(config))
    return config  # type: ignore[no-any-return]


def _require_default_weights(config: PretrainedConfig, folder: Path) -> None:
    """Refuse a config that gives its weight files other names: files of the usual names would be read instead."""
    named = getattr(config, "transformers_weights", None)
    if named is not None and named not in _WEIGHTS:
        raise UnsupportedArchitectureError(
            f"{folder}/config.json has transformers_weights={named!r}, but weights are read only from {' or '.join(_WEIGHTS)}: "
            "rename them and remove the key"
        )


def _import_failed(folder: Path, raw: RawConfig, gguf: GgufConfigFile | None, error: ImportError) -> RabbitError:
    """A missing package, as transformers names it; any other failed import means that the code is too old."""
    if gguf is not None:
        return missing_extra(str(gguf.path), "gguf", error)
    if "not found in your environment" in str(error) or isinstance(error, ModuleNotFoundError):
        return MissingExtraError(f"{folder}: install what its code imports ({first_line(error)})")
    return misfit(raw.get("transformers_version"), "while it was imported", error)


def _unsupported(folder: Path, raw: RawConfig, gguf: GgufConfigFile | None, error: Exception, trust_remote_code: bool) -> str:
    text = first_line(error)
    if trust_remote_code and raw.get("auto_map"):
        return str(misfit(raw.get("transformers_version"), "while its config was read", error))
    if "trust_remote_code" in str(error) and not trust_remote_code:
        return f"{folder} brings its own modelling code: read it, then give trust_remote_code=True ({text})"
    if gguf is not None:
        return f"{gguf.path} is not an architecture that the installed transformers builds: {text}"
    named = ", ".join(named_classes(raw, folder)) or "no class"
    return (
        f"{folder}/config.json ({named}) is not an architecture that the installed transformers builds: "
        f"{type(error).__name__}: {text}{faulty_key_of_config(raw)}"
    )


def _take_quantization(folder: Path, config: PretrainedConfig) -> Mapping[str, Any] | None:
    """How the stored weights are quantised, removed from the config because the model runs on plain weights."""
    holders = [part for part in (config, config.get_text_config(decoder=True)) if getattr(part, "quantization_config", None)]
    if not holders:
        return None
    method: Any = holders[0].quantization_config
    found: Any = method.to_dict() if hasattr(method, "to_dict") else method
    if not isinstance(found, dict):
        raise DamagedCheckpointError(f"{folder}/config.json has quantization_config={found!r}, expected an object")
    if method_of(found) not in _DEQUANTIZED:
        _refuse_quantized(folder, found)
    for part in holders:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    logger.info("%s is quantised (%s): its weights are decoded to plain ones", folder, method_of(found))
    return found


def _refuse_quantized(folder: Path, method: object) -> None:
    if method:
        kind = method_of(method) if isinstance(method, dict) else getattr(method, "quant_method", "?")
        raise CompressionUnavailableError(
            f"{folder} is quantised with {kind}, which is not supported; supported are {', '.join(_DEQUANTIZED)}: "
            "use a repository in one of these formats, or the unquantised one"
        )


def _find_class(config: PretrainedConfig, folder: Path, given: ConfigOverrides) -> type[PreTrainedModel]:
    """The class that the checkpoint was saved from. Raises UnsupportedArchitectureError."""
    auto = None if given.auto is None else auto_class(given.auto)
    reference = choose_remote(config, folder, auto) if given.trust_remote_code else None
    if reference is None:
        return choose_class(config, folder, auto)
    return _remote_class(reference, folder, config, given.code_revision)


def _remote_class(reference: str, folder: Path, config: PretrainedConfig, code_revision: str | None) -> type[PreTrainedModel]:
    repo, _, name = reference.rpartition("--")

    def told(error: Exception) -> RabbitError:
        if isinstance(error, ImportError):
            return _import_failed(folder, config.to_dict(), None, error)
        return misfit(written_for(config), "while it was imported", error)

    with foreign_code(told):
        found = import_class(name, repo or folder, code_revision)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UnsupportedArchitectureError(f"{folder}: {name} is not a transformers model class")
    return as_generating_class(found)
