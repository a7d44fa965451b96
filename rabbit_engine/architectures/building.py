"""The class of a model, built without weights: its code meets whatever the config says."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures.blame import blame_for_model
from rabbit_engine.architectures.remote import misfit, rename_caches, written_for
from rabbit_engine.errors import MismatchedWeightsError, MissingExtraError, RabbitError, UnsupportedArchitectureError, first_line
from rabbit_engine.transformers_bridge.building import build_without_weights, initialize_the_rest
from rabbit_engine.transformers_bridge.faults import mend_faults
from rabbit_engine.transformers_bridge.remote_code import is_remote


def build_skeleton(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The real class with every parameter on the meta device: shapes and dtypes, no bytes. `config` is not changed.

    Raises UnsupportedArchitectureError where the class cannot be built from the config, MissingExtraError where it needs a
    package, and what transformers raises for an attention implementation that the class does not have.
    """
    try:
        skeleton = construct(cls, config, dtype, attn_implementation)
        _require_decoder(skeleton)
        return skeleton
    except (MemoryError, RabbitError):
        raise
    except Exception as error:  # the code of any class meets any value
        if attn_implementation is not None and _builds(cls, config, dtype):
            raise
        raise _unbuildable(cls, config, dtype, error) from error


def _require_decoder(model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder and "encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UnsupportedArchitectureError(
            f"{config_path(model.config)} says is_encoder_decoder={model.config.is_encoder_decoder!r}, and "
            f"{type(model).__name__} is a decoder alone: take the key out"
        )


def construct(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The model on the meta device. Raises whatever the class does."""
    model = build_without_weights(cls, config_for(cls, copy.deepcopy(config)), dtype, attn_implementation)
    mend_faults(model)
    rename_caches(model)
    return model


def initialize(model: PreTrainedModel) -> None:
    """Let transformers make what it marked as not loaded. Raises UnsupportedArchitectureError where the class cannot."""
    try:
        initialize_the_rest(model)
    except (MemoryError, RabbitError):
        raise
    except Exception as error:  # the code of any class meets any value
        if is_remote(type(model)):
            raise misfit(written_for(model.config), "while its buffers were made", error) from error
        raise UnsupportedArchitectureError(
            f"{config_path(model.config)} lets {type(model).__name__} make no buffers: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _builds(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> bool:
    try:
        construct(cls, config, dtype)
    except Exception:  # noqa: BLE001 - as above
        return False
    return True


def _unbuildable(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, error: Exception) -> RabbitError:
    if is_remote(cls):
        return misfit(written_for(config), "while its model was built", error)
    if isinstance(error, ImportError):
        return MissingExtraError(f"{cls.__name__} needs a package that is not installed ({first_line(error)})")
    blamed = blame_for_model(config, lambda other: construct(cls, other, dtype))
    return UnsupportedArchitectureError(
        f"{config_path(config)} makes no {cls.__name__}: {type(error).__name__}: {first_line(error)}{blamed}"
    )


def require_layers(config: PretrainedConfig, stored: Collection[str]) -> None:
    """Raise MismatchedWeightsError for more layers than the checkpoint stores tensors: millions would take for ever to build."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(stored):
        raise MismatchedWeightsError(
            f"{config_path(config)} says num_hidden_layers={layers}, and the weight files hold {len(stored)} tensors: "
            "they are not this model's, or a download stopped"
        )


def config_path(config: PretrainedConfig) -> str:
    """Where a config came from, to be named in an error."""
    return f"{config.name_or_path}/config.json" if config.name_or_path else "config.json"


def config_for(cls: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The part of a composite config that `cls` is built from, as `AutoModelForCausalLM` chooses it."""
    text_class = config.sub_configs.get("text_config")
    wants_text = text_class is not None and getattr(cls, "config_class", None) == text_class
    return config.get_text_config() if wants_text else config
