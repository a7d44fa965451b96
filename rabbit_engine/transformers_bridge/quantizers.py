"""How transformers undoes the quantisation of a checkpoint while it loads, and what it quantises itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

Quantizer = HfQuantizer
TransposedLinear = Conv1D
"""GPT-2's linear layer, whose weight is [in, out]: quantisers store it as [out, in]."""


@dataclass(frozen=True, slots=True)
class Format:
    """A quantisation that transformers undoes without a GPU, one weight at a time.

    `method` is its name in a `quantization_config`, `operation` the class that undoes it in a converter. `roles` say what a
    stored tensor is to the weight, by the end of its name: "values", "unused", or what else `quantization/` decodes it with.
    """

    method: str
    operation: str
    roles: Mapping[str, str]


FORMATS = (
    Format("fp8", "Fp8Dequantize", {"weight": "values", "weight_scale_inv": "scales", "activation_scale": "unused"}),
    Format("mxfp4", "Mxfp4Dequantize", {"blocks": "values", "scales": "scales"}),
)

PACKED_METHODS = ("bitsandbytes", "gptq", "awq", "compressed-tensors")
"""Methods whose weights transformers leaves to other packages: `quantization/` decodes them without it."""


def method_of(quantization: Mapping[str, Any]) -> str:
    """The method that a `quantization_config` names, or bitsandbytes by its switches, as transformers reads it; "?" if none."""
    switches = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    return str(quantization.get("quant_method") or ("bitsandbytes" if switches else "?"))


def bitsandbytes_config(value: object) -> BitsAndBytesConfig | None:
    """The config that a caller gave, as an object or a dictionary; None for that of another quantiser.

    Raises ValueError or TypeError for invalid values.
    """
    if isinstance(value, Mapping) and method_of(value) == "bitsandbytes":
        found: BitsAndBytesConfig = BitsAndBytesConfig.from_dict(dict(value))
        return found
    return value if isinstance(value, BitsAndBytesConfig) else None


def mark_quantized(model: nn.Module) -> None:
    """Tell the code of a model that its linear layers are a quantiser's: Mamba's mixers then call them, not their weights."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def bitsandbytes_layers(model: PreTrainedModel, skip: Sequence[str] | None) -> list[str]:
    """The modules of `model` whose weights transformers quantises with bitsandbytes, if the caller lists `skip`."""
    names = None if skip is None else list(skip)
    kept: Any = model._keep_in_fp32_modules
    kept = HfQuantizer.get_modules_to_not_convert(model, names, kept)
    modules = ((name, module) for name, module in model.named_modules() if should_convert_module(name, kept))
    return [name for name, module in modules if type(module) is nn.Linear or isinstance(module, Conv1D)]


def open_dequantizer(quantization: Mapping[str, Any]) -> Quantizer:
    """What makes plain weights of a checkpoint with this `quantization_config`. Raises whatever the config class does."""
    quantizer: Quantizer = AutoHfQuantizer.from_config({**quantization, "dequantize": True}, pre_quantized=True)
    return quantizer


def block_of(quantizer: Quantizer) -> tuple[int, int] | None:
    """The number of rows and of columns that share a scale, if the config says it."""
    rows, columns = getattr(quantizer.quantization_config, "weight_block_size", None) or (None, None)
    return None if rows is None or columns is None else (int(rows), int(columns))


def allow_smaller_blocks(transforms: Iterable[Any], quantizer: Quantizer) -> None:
    """Let the transforms dequantise FP8 matrices whose last blocks are smaller.

    transformers refuses them, or takes all blocks for equal ones.
    """
    block = block_of(quantizer)
    for transform in transforms:
        for operation in getattr(transform, "operations", ()):
            stored = dequantizes(operation)
            if block is not None and stored is not None and stored.method == "fp8":
                operation.__class__ = _with_smaller_blocks(type(operation), block)


def _with_smaller_blocks(native: Any, block: tuple[int, int]) -> type:
    """The class of an operation, which dequantises a matrix with smaller blocks as if they were filled up with zeros."""

    def dequantize_one(self: Any, quantized: torch.Tensor, scales: torch.Tensor, **keywords: Any) -> torch.Tensor:
        missing = [-size % most for size, most in zip(quantized.shape, block, strict=False)]
        needed = [-(-size // most) for size, most in zip(quantized.shape, block, strict=False)]
        if quantized.dim() != 2 or not any(missing) or list(scales.shape) != needed:
            return native._dequantize_one(self, quantized, scales, **keywords)  # type: ignore[no-any-return]
        rows, columns = quantized.shape
        values = quantized.view(torch.uint8) if quantized.dtype.itemsize == 1 else quantized  # older versions cast them before
        whole = pad(values, (0, missing[1], 0, missing[0])).view(quantized.dtype)
        found: torch.Tensor = native._dequantize_one(self, whole, scales, **keywords)
        return found[:rows, :columns].contiguous()

    return type(native.__name__, (native,), {"__module__": native.__module__, "_dequantize_one": dequantize_one})


def dequantizes(operation: object) -> Format | None:
    """The format that an operation of a converter undoes; None for another operation."""
    if not type(operation).__module__.startswith("transformers."):
        return None
    return next((found for found in FORMATS if found.operation == type(operation).__name__), None)


def roles_of(stored: Format, patterns: Sequence[str]) -> list[tuple[str, int]] | None:
    """What each source pattern of a converter that dequantises is, and of which of its weights: the first, the second ...

    None for patterns that nothing is known of.
    """
    split = [_owner_and_role(stored, pattern.removesuffix("$")) for pattern in patterns]
    weights = [owner for owner, role in split if role == "values"]
    known = [(role, weights.index(owner)) for owner, role in split if role is not None and owner in weights]
    return known if len(known) == len(patterns) else None


def _owner_and_role(stored: Format, pattern: str) -> tuple[str, str | None]:
    owner, _, end = pattern.rpartition(".")
    if end in stored.roles:
        return owner, stored.roles[end]
    owner, _, end = pattern.rpartition("_")
    return owner, stored.roles.get(end)
