"""Which weights of a model a compressed split stores encoded, and how. Decided from its modules, not from their names.

The linear layers and experts of decoder layers are compressed, and the head. Norms, biases, routers, embeddings, convolutions,
parameters of state spaces and image towers are stored as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from rabbit_engine.architectures import find_layout
from rabbit_engine.config import BitsAndBytes, CompressionConfig
from rabbit_engine.quantization.bitsandbytes_made import (
    BLOCK,
    MadeBlocks4bit,
    MadeInt8Rows,
    PackedBlocks4bit,
    can_pack,
    packs_weights,
)
from rabbit_engine.quantization.eight_bit import EightBitRows
from rabbit_engine.quantization.four_bit import MOST_COLUMNS, FourBitGroups
from rabbit_engine.quantization.four_bit_layouts import can_multiply, layout_for
from rabbit_engine.quantization.lossless import Lossless
from rabbit_engine.quantization.storable import Storable
from rabbit_engine.transformers_bridge.experts import has_experts_interface
from rabbit_engine.transformers_bridge.quantizers import TransposedLinear, bitsandbytes_layers

logger = logging.getLogger(__name__)

INT8 = "int8"
"""The kind of bitsandbytes' weights in eight bits."""

Part = Literal["linear", "experts", "head"]

_NUMBERS_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ANY_ROWS = 64
"""A number of rows that every layout allows."""

_GROUPS = (64, 32)
"""Values that share a scale in four bits, the first that divides a row: 64 costs half a bit a value, 32 a whole one."""


@dataclass(frozen=True, slots=True)
class Compressor:
    """How one `compression` stores weights. `encode` returns None for a weight that is stored as it is."""

    encode: Callable[[Part, torch.dtype, tuple[int, ...], str], Storable | None]
    parameters: Mapping[str, Any]
    has_layout: bool = False


def compression_fingerprint(compression: CompressionConfig) -> dict[str, Any]:
    """What a manifest says of a compression, as JSON."""
    if compression.bitsandbytes is not None:
        return {"method": compression.method, **_bitsandbytes_fingerprint(compression.bitsandbytes, compression.device_type)}
    compressor = _COMPRESSORS[compression.method]
    layout = {"layout": layout_for(_ANY_ROWS, compression.device_type)} if compressor.has_layout else {}
    return {"method": compression.method, **compressor.parameters, **layout}


def equally_compressed(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Whether two fingerprints are of the same weights, in any layout: every machine decodes all of them.

    What bitsandbytes packs for a CPU has other scales, so that is another weight.
    """
    if first is None or second is None:
        return first is second
    return {**first, "layout": None} == {**second, "layout": None}


def warn_of_layout(made: Mapping[str, Any] | None, wanted: CompressionConfig | None) -> None:
    """Log a warning if shards are arranged for another machine than the one that computes: it decodes them first."""
    if made is None or wanted is None or wanted.device_type != "cpu":
        return
    here, there = compression_fingerprint(wanted).get("layout"), made.get("layout")
    if there != here and not can_multiply(str(there)):
        logger.warning(
            "the %s shards are arranged for %s, and this machine multiplies by %s: their weights are decoded first, which is "
            "slower; split again, into another layer_shards_saving_path, to avoid it",
            wanted.method,
            there,
            here,
        )


def _bitsandbytes_fingerprint(options: BitsAndBytes, device_type: str) -> dict[str, Any]:
    skip = None if options.skip is None else sorted(options.skip)
    packed = options.kind != INT8 and packs_weights(device_type)
    return {"kind": options.kind, "nested": options.nested, "skip": skip, "packed": packed}


def encodings_of(
    model: PreTrainedModel, dtypes: Callable[[str], torch.dtype], compression: CompressionConfig
) -> dict[str, Storable]:
    """The encoding of each weight of `model` (on the meta device) that is stored encoded; `dtypes` gives a weight's dtype."""
    if compression.bitsandbytes is not None:
        return dict(_by_bitsandbytes(model, compression.bitsandbytes, compression.device_type))
    encode, state = _COMPRESSORS[compression.method].encode, model.state_dict()
    found = {name: encode(part, dtypes(name), tuple(state[name].shape), compression.device_type) for name, part in _parts(model)}
    return {name: encoding for name, encoding in found.items() if encoding is not None}


def _by_bitsandbytes(model: PreTrainedModel, options: BitsAndBytes, device_type: str) -> Iterator[tuple[str, Storable]]:
    """As transformers has bitsandbytes quantise a model that it loads."""
    packs = options.kind != INT8 and packs_weights(device_type)
    for layer in bitsandbytes_layers(model, options.skip):
        rows, columns = shape_to_encode(model, f"{layer}.weight")
        if options.kind == INT8:
            yield f"{layer}.weight", MadeInt8Rows()
        elif packs and can_pack(rows, columns):
            yield f"{layer}.weight", PackedBlocks4bit(options.kind, options.nested)
        else:
            yield f"{layer}.weight", MadeBlocks4bit(options.kind, BLOCK, nested=options.nested)


def is_transposed(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight is encoded as its transpose: that of GPT-2's linear layers is [in, out]."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), TransposedLinear)


def shape_to_encode(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    """The shape in which a weight is encoded."""
    shape = tuple(model.get_parameter(name).shape)
    return shape[::-1] if is_transposed(model, name) else shape


def head_of(model: PreTrainedModel) -> str | None:
    """The weight of a head that is a linear layer."""
    head = find_layout(model).head
    return f"{head}.weight" if head is not None and _is_linear(model.get_submodule(head)) else None


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, Part]]:
    """The weights that can be compressed, and what they are."""
    count = _number_of_experts(model)
    for layer in find_layout(model).layers:
        for inner, module in model.get_submodule(layer).named_modules(prefix=layer):
            if _is_linear(module) and module.out_features > count:
                yield f"{inner}.weight", "linear"
            elif has_experts_interface(module) or not any(True for _ in module.children()):
                yield from ((f"{inner}.{name}", "experts") for name in _stacks(module, count))
    head = head_of(model)
    if head is not None:
        yield head, "head"


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward


def _stacks(module: nn.Module, count: int) -> list[str]:
    """The module's own stacks of one matrix per expert."""
    own = module.named_parameters(recurse=False)
    return [name for name, weight in own if weight.dim() == 3 and len(weight) == count]


def _number_of_experts(model: PreTrainedModel) -> int:
    """Of a layer; 0 for a dense model. A linear layer with no more outputs is a router."""
    modules = (module.num_experts for module in model.modules() if has_experts_interface(module))
    config: Any = model.config.get_text_config()
    said = (getattr(config, name, None) for name in _NUMBERS_OF_EXPERTS)
    return max((count for count in (*modules, *said) if isinstance(count, int)), default=0)


def _in_8_bits(part: Part, dtype: torch.dtype, shape: tuple[int, ...], device_type: str) -> Storable:
    del part, dtype, shape, device_type
    return EightBitRows()


def _in_4_bits(part: Part, dtype: torch.dtype, shape: tuple[int, ...], device_type: str) -> Storable:
    """Rows that are no whole groups, or too long, take eight bits, like the head: its errors go straight to the logits."""
    del dtype
    group = next((size for size in _GROUPS if shape[-1] % size == 0), None)
    if part == "head" or group is None or shape[-1] > MOST_COLUMNS:
        return EightBitRows()
    return FourBitGroups(group, layout_for(shape[-2], device_type))


def _without_loss(part: Part, dtype: torch.dtype, shape: tuple[int, ...], device_type: str) -> Storable | None:
    """Only bfloat16 has few exponents among many bits."""
    del part, device_type
    try:
        Lossless().components(dtype, shape)
    except ValueError:
        return None
    return Lossless()


_COMPRESSORS: Mapping[str, Compressor] = {
    "8bit": Compressor(_in_8_bits, {}),
    "4bit": Compressor(_in_4_bits, {"groups": list(_GROUPS)}, has_layout=True),
    "lossless": Compressor(_without_loss, {}),
}
