"""Joins the tensors that a quantised checkpoint stores for each weight: the rest of a resolution sees one, which decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from rabbit_engine.architectures import Architecture, Conversion, config_path
from rabbit_engine.checkpoints.formats import LazyTensor, SafetensorsTensor
from rabbit_engine.config import CompressionConfig
from rabbit_engine.errors import CompressionUnavailableError, DamagedCheckpointError, first_line
from rabbit_engine.quantization import UNUSED, Blocks4bit, Int8Rows, Linears, PackedFormat, ShapeOf, StoredWeight, open_packed
from rabbit_engine.quantization.bitsandbytes_made import PackedBlocks4bit
from rabbit_engine.storage.directio import damage_as
from rabbit_engine.storage.tensorfiles import TensorEntry, decoded_as
from rabbit_engine.transformers_bridge.quantizers import TransposedLinear, mark_quantized, method_of


def packed_format(architecture: Architecture) -> PackedFormat | None:
    """The format of the architecture's quantised weights, if its tensors are joined here.

    Raises CompressionUnavailableError for a variant that is not supported, or a `quantization_config` that cannot be read.
    """
    config = architecture.quantization
    if config is None:
        return None
    try:
        return open_packed(method_of(config), config)
    except ValueError as error:
        if isinstance(error, CompressionUnavailableError):
            raise
        path = config_path(architecture.config)
        raise CompressionUnavailableError(f"{path}: quantization_config cannot be read: {first_line(error)}") from error


@damage_as(DamagedCheckpointError)
def join_packed(
    tensors: Mapping[str, LazyTensor], stored: PackedFormat, dtype: torch.dtype, shape_of: ShapeOf
) -> dict[str, LazyTensor]:
    """`tensors` with those of each quantised weight joined to one, named `weight` as in an unquantised checkpoint.

    Quantised weights decode to `dtype`; `shape_of` tells what shape the model wants of a name. Raises DamagedCheckpointError
    if tensors of a weight are missing, or do not fit together; CompressionUnavailableError for pickles.
    """
    found: dict[str, LazyTensor] = {}
    modules: dict[str, dict[str, tuple[str, LazyTensor]]] = {}
    for key, tensor in tensors.items():
        place = stored.place_of(key)
        if place is None:
            found[key] = tensor
        else:
            module, role = place
            modules.setdefault(module, {})[role] = (key, tensor)
    for module, parts in modules.items():
        name, used = f"{module}.weight", {role: part for role, part in parts.items() if role != UNUSED}
        if list(used) == ["values"] and _is_plain(used["values"][1].dtype):
            found[name] = used["values"][1]
        elif used:
            found[name] = SafetensorsTensor(_join(name, used, stored, dtype, shape_of))
    return found


def _is_plain(dtype: torch.dtype) -> bool:
    """Whether a weight of that dtype, without scales, is not quantised."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _join(
    name: str, parts: Mapping[str, tuple[str, LazyTensor]], stored: PackedFormat, dtype: torch.dtype, shape_of: ShapeOf
) -> TensorEntry:
    entries = {role: tensor.entry for role, (_, tensor) in parts.items() if isinstance(tensor, SafetensorsTensor)}
    path = next(iter(parts.values()))[1].path
    if len(entries) < len(parts):
        raise CompressionUnavailableError(f"{path}: weights quantised with {stored.method} are read from safetensors files only")
    entry = stored.make(StoredWeight(name, dtype, entries, shape_of))
    if isinstance(entry, str):
        raise DamagedCheckpointError(f"{path}: {name}, quantised with {stored.method}, cannot be decoded: {entry}")
    return replace(entry, name=name)


def with_own_linears(conversion: Conversion, architecture: Architecture) -> Conversion:
    """The conversion for streaming in place: layers compute as bitsandbytes computes with such weights, and change so.

    Those are linear layers whose weight is stored for them alone; an expert of a stack is only decoded.
    """
    config = architecture.quantization
    if config is None or method_of(config) != "bitsandbytes":
        return conversion
    linears, tensors = Linears.of(config), dict(conversion.tensors)
    for key, target in conversion.targets.items():
        tensor = tensors[key]
        if target is not None and not target.converted and isinstance(tensor, SafetensorsTensor):
            weight, largest = own_linear(conversion.skeleton, target.name, tensor.entry, linears)
            tensors[key] = SafetensorsTensor(weight)
            if largest is not None:
                tensors[f"{key.removesuffix('.weight')}.SCB"] = SafetensorsTensor(largest)
    mark_quantized(conversion.skeleton)
    return replace(conversion, tensors=tensors)


def as_computed(
    model: PreTrainedModel, entries: Mapping[str, TensorEntry], compression: CompressionConfig | None
) -> dict[str, TensorEntry]:
    """The entries of a split for `model`: if bitsandbytes quantised its weights, layers change to compute as that does."""
    if compression is None or compression.bitsandbytes is None:
        return dict(entries)
    linears = Linears.made_by(compression.bitsandbytes)
    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        found[name], largest = own_linear(model, name, entry, linears)
        if largest is not None:
            found[largest.name] = largest
    mark_quantized(model)
    return found


def own_linear(model: nn.Module, name: str, entry: TensorEntry, linears: Linears) -> tuple[TensorEntry, TensorEntry | None]:
    """Make the linear layer of the weight `name` compute as bitsandbytes does with `entry`; other layers stay as they are.

    Returns the entries of its weight and, in int8, of the largest magnitudes of rows.
    """
    owner, _, attribute = name.rpartition(".")
    is_blocks = isinstance(entry.encoding, Blocks4bit | PackedBlocks4bit)
    layer = (
        _linear(model, owner, entry) if attribute == "weight" and (is_blocks or isinstance(entry.encoding, Int8Rows)) else None
    )
    if layer is None:
        return entry, None
    if is_blocks:
        linears.compute_4bit(layer)
        return decoded_as(entry, linears.dtype), None
    linears.compute_8bit(layer)
    values, largest = entry.components
    return replace(values, name=name), replace(largest, name=f"{owner}.SCB")


def _linear(model: nn.Module, owner: str, entry: TensorEntry) -> nn.Linear | None:
    """The linear layer `owner`; a transposing one of GPT-2 becomes one, as in transformers."""
    module = model.get_submodule(owner)
    if isinstance(module, TransposedLinear):
        rows, columns = entry.shape
        linear = nn.Linear(columns, rows, bias=module.bias is not None, device="meta", dtype=module.weight.dtype)
        model.set_submodule(owner, linear.eval())
        return linear
    return module if type(module) is nn.Linear else None
