"""Lets a forward run on the meta device, which has no values: answers what it cannot, and restores what modules keep."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from rabbit_engine.transformers_bridge.attention import sdpa_for_flash_attention
from rabbit_engine.transformers_bridge.experts import experts_computed_by, first_projection, register_experts_function
from rabbit_engine.transformers_bridge.rotary import fixed_frequencies


@contextmanager
def runs_without_values(model: PreTrainedModel, device_type: str) -> Iterator[None]:
    """Forwards run on the meta device, as on a device of that type; the model is afterwards as it was."""
    with (
        torch.no_grad(),
        _unchanged(model),
        fixed_frequencies(model),
        _chosen_kernels(model),
        torch.device("meta"),
        _Answers(device_type),
    ):
        yield


@functools.cache
def _has_fused_kernel(device_type: str, dtype: torch.dtype, width: int, value_width: int, masked: bool) -> bool:
    """Whether attention with heads of this width runs in one kernel, which never holds all scores: by trying it on a CPU,
    assumed elsewhere."""
    if device_type != "cpu":
        return True
    query, value = (torch.zeros(1, 1, 2, size, dtype=dtype, device="cpu") for size in (width, value_width))
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="cpu") if masked else None
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            warnings.simplefilter("ignore")  # torch warns about the reason
            functional.scaled_dot_product_attention(query, query, value, attn_mask=mask)
    except RuntimeError:  # no kernel for these shapes
        return False
    return True


_ALL_OR_ANY: Mapping[Any, bool] = {torch.all: True, torch.Tensor.all: True, torch.any: False, torch.Tensor.any: False}


class _Answers(TorchFunctionMode):
    """Answers what the meta device cannot: attention, with the memory of the device's kernel; whether a token is in a prompt
    (GPT-2 looks for padding); whether all values of a tensor are true (of a mask, of numbers that are finite), or any; and what
    else a forward asks of a value: no."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run everything else unchanged."""
        del types
        kwargs = kwargs or {}
        if func is torch.Tensor.__contains__ or (func is torch.Tensor.__bool__ and args[0].is_meta):
            return False
        if func in _ALL_OR_ANY and len(args) == 1 and not kwargs and args[0].is_meta:
            return torch.tensor(_ALL_OR_ANY[func], device="cpu")
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        query, key, value, mask = (args[index] if index < len(args) else kwargs.get(name) for index, name in enumerate(names))
        if not _has_fused_kernel(self._device_type, query.dtype, query.shape[-1], value.shape[-1], mask is not None):
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        packed = [torch.empty_like(key), torch.empty_like(value)]  # bf16 kernels copy both into a new layout
        if mask is not None and mask.dtype == torch.bool:
            packed.append(mask.to(query.dtype))
        return query.new_empty(*query.shape[:-1], value.shape[-1])


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Restore what forwards keep in their modules: a rotary embedding's frequencies, which would have no values, and the hooks
    with which transformers captures outputs."""
    before = {module: (dict(vars(module)), _tables(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, (attributes, tables) in before.items():
            vars(module).clear()
            vars(module).update(attributes)
            for name, entries in tables.items():  # the same objects: handles of hooks refer to them
                attributes[name].clear()
                attributes[name].update(entries)


def _tables(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """A copy of each dict that a module keeps: its buffers, its hooks."""
    return {name: dict(value) for name, value in vars(module).items() if isinstance(value, dict)}


def _experts_without_values(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """A function of the experts interface that returns results of the right shapes: grouped kernels fail on the meta device."""
    tokens, used = top_k_index.shape
    up = getattr(module, first_projection(module))
    rows = hidden_states.repeat_interleave(used, dim=0)
    inner = rows.new_empty(len(rows), up.shape[-1 if module.is_transposed else 1])
    result = rows.new_empty(rows.shape) * top_k_weights.reshape(-1, 1)
    del inner
    return result.view(tokens, used, -1).sum(dim=1).to(hidden_states.dtype)


_EXPERTS = "rabbit_engine_probe"
register_experts_function(_EXPERTS, _experts_without_values)


@contextmanager
def _chosen_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Use sdpa, which runs on the meta device: flash attention does not, nor do all kernels for experts."""
    with sdpa_for_flash_attention(model), experts_computed_by(model, _EXPERTS):
        yield
