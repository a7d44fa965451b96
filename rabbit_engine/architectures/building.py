"""Builds a model class without weights. Its code runs on whatever values the config has."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures.architecture import Architecture
from rabbit_engine.architectures.faulty_key import faulty_key_of_model
from rabbit_engine.architectures.layout import find_layout
from rabbit_engine.architectures.remote import misfit, rename_caches, written_for
from rabbit_engine.errors import MismatchedWeightsError, MissingExtraError, RabbitError, UnsupportedArchitectureError, first_line
from rabbit_engine.transformers_bridge.building import build_without_weights, initialize_the_rest
from rabbit_engine.transformers_bridge.faults import fix_known_bugs
from rabbit_engine.transformers_bridge.loading import allow_new_weights
from rabbit_engine.transformers_bridge.remote_code import is_remote
from rabbit_engine.utils.foreign import foreign_code


def build_architecture(
    architecture: Architecture, cls: type[PreTrainedModel], dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """`build_skeleton` of an architecture as `cls`, which is its class or a subclass; a checkpoint may lack a new head."""
    skeleton = build_skeleton(cls, architecture.config, dtype, attn_implementation)
    if architecture.new_head:
        layout = find_layout(skeleton)
        allow_new_weights(skeleton, but=[*filter(None, [layout.embedding]), *layout.towers, *layout.layers, *layout.others])
    return skeleton


def build_skeleton(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The real class with every parameter on the meta device: shapes and dtypes, no bytes. `config` is not changed.

    Raises UnsupportedArchitectureError if the class cannot be built from the config, MissingExtraError if it needs a missing
    package, and transformers' own error for an attention implementation that the class does not support.
    """
    try:
        skeleton = construct(cls, config, dtype, attn_implementation)
        _require_decoder(skeleton)
        return skeleton
    except (MemoryError, RabbitError):
        raise
    except Exception as error:  # a model class may raise anything; what the attention is to blame for stays
        if attn_implementation is not None and _builds(cls, config, dtype):
            raise
        raise _unbuildable(cls, config, dtype, error) from error


def _require_decoder(model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder and "encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UnsupportedArchitectureError(
            f"{config_path(model.config)} has is_encoder_decoder={model.config.is_encoder_decoder!r}, but "
            f"{type(model).__name__} is a decoder only: remove the key"
        )


def construct(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The model on the meta device. Raises whatever the class does."""
    model = build_without_weights(cls, config_for(cls, copy.deepcopy(config)), dtype, attn_implementation)
    fix_known_bugs(model)
    rename_caches(model)
    return model


def initialize(model: PreTrainedModel) -> None:
    """Let transformers initialise what it marked as not loaded. Raises UnsupportedArchitectureError if the class fails."""

    def told(error: Exception) -> RabbitError:
        if is_remote(type(model)):
            return misfit(written_for(model.config), "while its buffers were created", error)
        return UnsupportedArchitectureError(
            f"{type(model).__name__} cannot create its buffers from {config_path(model.config)}: "
            f"{type(error).__name__}: {first_line(error)}"
        )

    with foreign_code(told):
        initialize_the_rest(model)


def _builds(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> bool:
    try:
        construct(cls, config, dtype)
    except Exception:  # noqa: BLE001 - a model class may raise anything; whether it does is what was asked
        return False
    return True


def _unbuildable(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, error: Exception) -> RabbitError:
    if is_remote(cls):
        return misfit(written_for(config), "while its model was built", error)
    if isinstance(error, ImportError):
        return MissingExtraError(f"{cls.__name__} needs a package that is not installed ({first_line(error)})")
    faulty_key = faulty_key_of_model(config, lambda other: construct(cls, other, dtype))
    return UnsupportedArchitectureError(
        f"{cls.__name__} cannot be built from {config_path(config)}: {type(error).__name__}: {first_line(error)}{faulty_key}"
    )


def require_layers(config: PretrainedConfig, stored: Collection[str]) -> None:
    """Raise MismatchedWeightsError if the config has more layers than the checkpoint has tensors: building them may never end."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(stored):
        raise MismatchedWeightsError(
            f"{config_path(config)} has num_hidden_layers={layers}, but the weight files hold {len(stored)} tensors: "
            "they belong to another model, or a download was interrupted"
        )


def config_path(config: PretrainedConfig) -> str:
    """The path of a config, for error messages."""
    return f"{config.name_or_path}/config.json" if config.name_or_path else "config.json"


def config_for(cls: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The part of a composite config that `cls` is built from, as `AutoModelForCausalLM` chooses it."""
    text_class = config.sub_configs.get("text_config")
    wants_text = text_class is not None and getattr(cls, "config_class", None) == text_class
    return config.get_text_config() if wants_text else config
