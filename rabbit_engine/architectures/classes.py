"""From a folder's config to the class of its model, built without weights."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import _get_model_class, add_generation_mixin_to_remote_model

from rabbit_engine.architectures.architecture import Architecture, Family, RawConfig
from rabbit_engine.architectures.faults import mend_faults
from rabbit_engine.architectures.registry import find_family
from rabbit_engine.architectures.remote import MISFITS, is_remote, misfit, rename_caches, written_for
from rabbit_engine.errors import (
    CheckpointNotFoundError,
    CompressionUnavailableError,
    MissingExtraError,
    RabbitError,
    UnsupportedArchitectureError,
    first_line,
)

logger = logging.getLogger(__name__)

_DEQUANTIZED = ("fp8", "mxfp4")
"""Formats that transformers dequantises without a GPU, a weight at a time: DeepSeek-V3's and GPT-OSS's."""

_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText)


def find_architecture(folder: Path, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> Architecture:
    """What the checkpoint in `folder` is: a family that is converted, else a class of transformers, else one of its own code.

    Raises CheckpointNotFoundError (no config.json), UnsupportedArchitectureError (no class for it, or it needs code that was
    not allowed), MissingExtraError (GGUF without the package) or CompressionUnavailableError (quantised).
    """
    raw = {} if gguf_file is not None else _read_raw(folder)
    family = find_family(raw)
    if family is not None:
        return _converted(family, raw, folder)
    config = find_config(folder, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    quantization = _take_quantization(folder, config)
    cls = find_class(config, folder, trust_remote_code=trust_remote_code)
    return Architecture(cls=cls, config=config_for(cls, config), quantization=quantization)


def _read_raw(folder: Path) -> RawConfig:
    """config.json as it is written; empty where there is none or it cannot be read, which `find_config` says."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _converted(family: Family, raw: RawConfig, folder: Path) -> Architecture:
    _refuse_quantized(folder, raw.get("quantization_config"))
    try:
        architecture = replace(family.convert(raw, folder), family=family.name, tokenizer=family.tokenizer)
    except RabbitError:
        raise
    except KeyError as error:
        raise UnsupportedArchitectureError(f"{folder}/config.json is a {family.name}'s and lacks {error}") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise UnsupportedArchitectureError(f"{folder}/config.json is no {family.name}'s: {first_line(error)}") from error
    logger.info("%s is a %s: converted to %s, none of its own code runs", folder, family.name, architecture.cls.__name__)
    return architecture


def find_config(folder: Path, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The checkpoint's config, as transformers reads it; raises what `find_architecture` does."""
    if gguf_file is None and not (folder / "config.json").is_file():
        raise CheckpointNotFoundError(f"{folder} has no config.json: is it the folder of a model?")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, gguf_file=gguf_file)
    except ImportError as error:
        raise _import_failed(folder, gguf_file, error) from error
    except OSError as error:
        raise CheckpointNotFoundError(f"{folder} has no config that can be read ({first_line(error)})") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise UnsupportedArchitectureError(_unsupported(folder, error, trust_remote_code)) from error
    return config  # type: ignore[no-any-return]


def _import_failed(folder: Path, gguf_file: str | None, error: ImportError) -> Exception:
    """A package that is not there, by the name that transformers gives; any other failed import is of code that is too old."""
    if gguf_file is not None:
        return MissingExtraError(f"{folder / gguf_file}: pip install rabbit_engine[gguf] ({first_line(error)})")
    if "not found in your environment" in str(error) or isinstance(error, ModuleNotFoundError):
        return MissingExtraError(f"{folder}: install what its code imports ({first_line(error)})")
    return misfit(_read_raw(folder).get("transformers_version"), "while it was imported", error)


def _unsupported(folder: Path, error: Exception, trust_remote_code: bool) -> str:
    text = first_line(error)
    if trust_remote_code and _read_raw(folder).get("auto_map"):
        return str(misfit(_read_raw(folder).get("transformers_version"), "while its config was read", error))
    if "trust_remote_code" in str(error) and not trust_remote_code:
        return f"{folder} brings its own modelling code: read it, then give trust_remote_code=True ({text})"
    return f"{folder} is not an architecture that the installed transformers builds: {text}"


def _take_quantization(folder: Path, config: PretrainedConfig) -> Mapping[str, Any] | None:
    """How the stored weights are quantised, taken out of the config: what runs are plain weights."""
    holders = [part for part in (config, config.get_text_config(decoder=True)) if getattr(part, "quantization_config", None)]
    if not holders:
        return None
    method = holders[0].quantization_config
    found: dict[str, Any] = method if isinstance(method, dict) else method.to_dict()
    if found.get("quant_method") not in _DEQUANTIZED:
        _refuse_quantized(folder, found)
    for part in holders:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    logger.info("%s is quantised (%s): its weights are dequantised when it is split", folder, found["quant_method"])
    return found


def _refuse_quantized(folder: Path, method: Any) -> None:
    if method:
        kind = method.get("quant_method", "?") if isinstance(method, dict) else getattr(method, "quant_method", "?")
        raise CompressionUnavailableError(
            f"{folder} is quantised already ({kind}); this version streams plain weights and undoes {', '.join(_DEQUANTIZED)} "
            "only: use the unquantised repository"
        )


def find_class(config: PretrainedConfig, folder: Path, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that the checkpoint was saved from where it sees images or makes vectors of texts, else what
    `AutoModelForCausalLM` would build.

    Raises UnsupportedArchitectureError.
    """
    if _embeds(config, folder):
        return _get_model_class(config, AutoModel._model_mapping)  # type: ignore[no-any-return]
    autos = _AUTO_CLASSES[::-1] if _sees_images(config) else _AUTO_CLASSES
    for auto in autos:
        reference = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
        if reference is not None and trust_remote_code:
            return _remote_class(reference, folder, config)
        if type(config) in auto._model_mapping:
            return _get_model_class(config, auto._model_mapping)  # type: ignore[no-any-return]
    hint = "" if not getattr(config, "auto_map", None) else "; it brings its own code: read it, then give trust_remote_code=True"
    raise UnsupportedArchitectureError(
        f"{folder} is a {config.model_type!r} model ({config.architectures}): transformers has no class that generates{hint}"
    )


def _sees_images(config: PretrainedConfig) -> bool:
    """Whether the config names the class that transformers has for its images and text."""
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        return False
    cls = _get_model_class(config, AutoModelForImageTextToText._model_mapping)
    return cls.__name__ in (config.architectures or ())


def _embeds(config: PretrainedConfig, folder: Path) -> bool:
    """Whether it is a model without a head, of sentence-transformers: its text comes to a vector, and no token follows."""
    if not (folder / "modules.json").is_file() or type(config) not in AutoModel._model_mapping:
        return False
    return _get_model_class(config, AutoModel._model_mapping).__name__ in (config.architectures or ())


def _remote_class(reference: str, folder: Path, config: PretrainedConfig) -> type[PreTrainedModel]:
    repo, _, name = str(reference).rpartition("--")
    try:
        found: Any = get_class_from_dynamic_module(name, repo or str(folder))
    except ImportError as error:
        raise _import_failed(folder, None, error) from error
    except (AttributeError, NameError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise misfit(written_for(config), "while it was imported", error) from error
    if not issubclass(found, PreTrainedModel):
        raise UnsupportedArchitectureError(f"{folder}: {name} is no model of transformers")
    found.register_for_auto_class(auto_class=AutoModelForCausalLM)
    return add_generation_mixin_to_remote_model(found)  # type: ignore[no-any-return]


def build_skeleton(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The real class with every parameter on the meta device: shapes and dtypes, no bytes. `config` is not changed.

    Raises what transformers raises for an attention implementation that the class does not have.
    """
    config = config_for(cls, copy.deepcopy(config))
    keywords: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with torch.device("meta"), init.meta_device_safe_creation_ops():
            model: PreTrainedModel = cls._from_config(config, dtype=dtype, **keywords).eval()
    except MISFITS as error:
        if not is_remote(cls) or attn_implementation is not None:
            raise
        raise misfit(written_for(config), "while its model was built", error) from error
    mend_faults(model)
    rename_caches(model)
    return model


def config_for(cls: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The part of a composite config that `cls` is built from, as `AutoModelForCausalLM` chooses it."""
    text_class = config.sub_configs.get("text_config")
    wants_text = text_class is not None and getattr(cls, "config_class", None) == text_class
    return config.get_text_config() if wants_text else config
