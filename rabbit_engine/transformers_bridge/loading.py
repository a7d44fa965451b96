"""Loads tensors into the weights of a model, like `from_pretrained`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from rabbit_engine.transformers_bridge.multi_token import layers_of_heads
from rabbit_engine.transformers_bridge.progress import without_progress_bars
from rabbit_engine.transformers_bridge.quantizers import Quantizer
from rabbit_engine.transformers_bridge.weight_transforms import WeightTransform


class Unread(Protocol):
    """A stored tensor, or one that is read when indexed."""

    def __getitem__(self, index: object, /) -> torch.Tensor:
        """The whole tensor; the only index used is `[...]`."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The loaded weights by the model's names, on the CPU, with the shapes and dtypes of the model.

    `mismatched` are (weight, stored shape, the model's shape); `failed` maps a weight to its error.
    """

    weights: Mapping[str, torch.Tensor]
    mismatched: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


def weight_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """weight -> its dtype in a model loaded as `dtype`; a class may keep some in float32."""
    plan = model._get_dtype_plan(dtype)
    return {
        name: next((kept for pattern, kept in plan.items() if re.search(pattern, name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def may_be_missing(model: PreTrainedModel) -> tuple[str, ...]:
    """Patterns of weights that a checkpoint may lack: the class creates them itself."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def allow_new_weights(model: PreTrainedModel, but: Iterable[str]) -> None:
    """Let a checkpoint lack all weights `but` those in these modules: the class creates them."""
    modules = "|".join(re.escape(name) for name in but)
    model._keys_to_ignore_on_load_missing = [*may_be_missing(model), rf"^(?!({modules})\.)"]


def may_be_unused(model: PreTrainedModel, *, dequantizes: bool = False) -> re.Pattern[str]:
    """A pattern of the stored weights, under the model's names, that the model does not have and transformers ignores.

    These are the class's own, multi-token heads, buffers that older versions stored, and the scales of dequantised weights.
    """
    buffers = [name for name, _ in model.named_buffers()]
    stored_once = [name for name in ("rotary_emb.inv_freq", "position_ids") if any(buffer.endswith(name) for buffer in buffers)]
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *map(re.escape, stored_once)]
    patterns += [rf"(^|\.)layers\.{index}\." for index in layers_of_heads(model.config)]
    patterns += [r"_scale_inv$", r"_scales$"] if dequantizes else []
    return re.compile("|".join(f"({pattern})" for pattern in patterns) or r"(?!)")


def load_weights(
    model: PreTrainedModel,
    tensors: Mapping[str, Unread],
    dtype: torch.dtype,
    transforms: Sequence[WeightTransform],
    quantizer: Quantizer | None = None,
) -> Loaded:
    """Read `tensors` and convert them to weights. `model`, on the meta device, is left unchanged."""
    before, wanted = dict(model.state_dict(keep_vars=True)), weight_dtypes(model, dtype)
    own: Any = copy.deepcopy(list(transforms))  # each counts the tensors it was used for
    plan = model._get_dtype_plan(dtype)
    config = LoadStateDictConfig(dtype=dtype, dtype_plan=plan, hf_quantizer=quantizer, weight_mapping=own)
    try:
        with without_progress_bars():
            info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
        if info.mismatched_keys or info.conversion_errors:
            return Loaded({}, sorted(info.mismatched_keys), info.conversion_errors)
        made = {name: model.get_parameter_or_buffer(name).detach() for name in before if name not in info.missing_keys}
        return Loaded({name: tensor.to(wanted[name]) for name, tensor in made.items()})  # dequantising leaves some unchanged
    finally:
        _put_back(model, before)


def _put_back(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        table: Any = module._buffers if attribute in module._buffers else module._parameters
        table[attribute] = tensor
    model._weight_conversions = None  # type: ignore[assignment]
