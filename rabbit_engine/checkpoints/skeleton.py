"""The model on the meta device that a checkpoint is compared with: built once, with the checkpoint's own head_dim."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rabbit_engine.architectures import (
    Architecture,
    Conversion,
    build_architecture,
    corrected_head_dim,
    open_conversion,
    require_layers,
)
from rabbit_engine.checkpoints.formats import LazyTensor
from rabbit_engine.checkpoints.packed import join_packed, packed_format
from rabbit_engine.checkpoints.split_plan import Ties, missing_weights, tied_together
from rabbit_engine.errors import MismatchedWeightsError
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.transformers_bridge.loading import may_be_missing
from rabbit_engine.transformers_bridge.tied_weights import tied_weights

Build = Callable[[Architecture, torch.dtype], PreTrainedModel]
"""Builds an architecture's model on the meta device: loading builds the class that streams, with its attention chosen."""

Shapes = Mapping[str, tuple[int, ...]]


def build_plain(architecture: Architecture, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture's own class, with transformers' choice of attention."""
    return build_architecture(architecture, architecture.cls, dtype)


def build_for_entries(
    architecture: Architecture, dtype: torch.dtype, entries: Mapping[str, TensorEntry], build: Build
) -> PreTrainedModel:
    """The model of `entries`. Raises MismatchedWeightsError if the config has more layers than there are entries."""
    require_layers(architecture.config, entries)
    shapes = {name: entry.shape for name, entry in entries.items()}
    return _with_head_dim(build(architecture, dtype), architecture, dtype, shapes, build)


def map_names(architecture: Architecture, dtype: torch.dtype, tensors: Mapping[str, LazyTensor], build: Build) -> Conversion:
    """The conversion from a checkpoint's names to the model's; it builds and holds the model.

    Raises MismatchedWeightsError if the config has more layers than the checkpoint has tensors, and the errors of `join_packed`.
    """
    require_layers(architecture.config, tensors)
    packed, model = packed_format(architecture), build(architecture, dtype)
    if packed is not None:
        tensors = join_packed(tensors, packed, dtype, open_conversion(architecture, model, {}, dtype).shape_for)
    conversion = open_conversion(architecture, model, tensors, dtype)
    shapes = {
        target.name: tuple(tensors[key].shape)
        for key, target in conversion.targets.items()
        if target is not None and not target.converted
    }
    model = _with_head_dim(conversion.skeleton, architecture, dtype, shapes, build)
    return conversion if model is conversion.skeleton else open_conversion(architecture, model, tensors, dtype)


def _with_head_dim(
    model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, shapes: Shapes, build: Build
) -> PreTrainedModel:
    """The model, or one with the head_dim of the stored shapes. The architecture's config is not changed."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    head_dim = corrected_head_dim(model.config, wanted, shapes)
    if head_dim is None:
        return model
    config = copy.deepcopy(architecture.config)
    config.get_text_config().head_dim = head_dim
    return build(replace(architecture, config=config), dtype)


def require_weights(skeleton: PreTrainedModel, stored: Iterable[str], ties: Ties, originals: Path) -> None:
    """Raise MismatchedWeightsError for weights that are neither stored nor shared."""
    absent = missing_weights(skeleton.state_dict(), stored, ties.shared, may_be_missing(skeleton))
    if absent:
        rest = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise MismatchedWeightsError(
            f"{originals} lacks weights of {type(skeleton).__name__}: {', '.join(absent[:5])}{rest}; "
            "is it a checkpoint of another class, or an interrupted download?"
        )


def require_fit(model: PreTrainedModel, entries: Mapping[str, TensorEntry], ties: Mapping[str, str]) -> None:
    """Raise MismatchedWeightsError if stored weights and ties do not match this model, or are incomplete.

    Weights without a place in the model are ignored: those of extra layers, if the caller requests fewer.
    """
    state, tied = model.state_dict(), tied_together(tied_weights(model))
    wrong = [name for name, entry in entries.items() if name in state and not _fits(state[name], entry)]
    wrong += [
        name for name, stored in ties.items() if stored not in tied.get(name, ()) or not _fits(state.get(name), entries[stored])
    ]
    wrong += missing_weights(state, entries, ties, may_be_missing(model))
    if wrong:
        folder = next((entry.path.parent for entry in entries.values()), "the split")
        raise MismatchedWeightsError(
            f"{folder} does not fit {type(model).__name__} ({wrong[0]} and {len(wrong) - 1} more): "
            "it was split for another config or by another transformers, or its manifest is damaged; delete it and split again"
        )


def _fits(weight: torch.Tensor | None, entry: TensorEntry) -> bool:
    """Whether `entry` can be this weight; some weights stay float32 regardless of the model's dtype."""
    return weight is not None and tuple(weight.shape) == entry.shape and entry.dtype in (weight.dtype, torch.float32)
