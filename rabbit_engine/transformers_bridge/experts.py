"""The experts interface of sparse layers: a function, chosen by name in a module's config, computes all its experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_MARKS = ("is_concatenated", "is_transposed", "has_bias", "has_gate", "num_experts")
"""Attributes that the decorator of a class of experts, and the class, set on a module."""


_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


class ExpertsModule(nn.Module):
    """The attributes of a module with the interface, for type checkers only: no module is an instance.

    Its stacks of weights are `gate_up_proj` or `up_proj` and `down_proj`, [experts, outputs, inputs], or [experts, inputs,
    outputs] if `is_transposed`, and `..._bias` [experts, outputs] if `has_bias`.
    """

    config: PretrainedConfig
    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]


ExpertsFunction = Callable[[ExpertsModule, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(module, hidden states [tokens, hidden], indices and weights [tokens, experts a token]) -> [tokens, hidden]."""


def has_experts_interface(module: nn.Module) -> TypeGuard[ExpertsModule]:
    """Whether a function of the interface may compute this module's experts."""
    return all(hasattr(module, name) for name in _MARKS)


def experts_a_token(module: Any) -> int:
    """The number of experts per token in the config; all of them if not stated."""
    return next((used for name in _TOP_K if isinstance(used := getattr(module.config, name, None), int)), module.num_experts)


def experts_of(model: nn.Module) -> tuple[int, int] | None:
    """The experts of a sparse layer, and those that a token uses; None for a model without."""
    found = next((module for module in model.modules() if has_experts_interface(module)), None)
    return None if found is None else (found.num_experts, min(experts_a_token(found), found.num_experts))


def register_experts_function(name: str, function: ExpertsFunction) -> None:
    """Make `function` available to the config of any module under `name`."""
    ALL_EXPERTS_FUNCTIONS.register(name, function)


def choose_experts_function(module: ExpertsModule, name: str) -> None:
    """Make the function `name` compute only `module`, which gets its own config: the model may choose another one later."""
    module.config = copy.deepcopy(module.config)
    module.config._experts_implementation = name


@contextmanager
def experts_computed_by(model: nn.Module, name: str) -> Iterator[None]:
    """Make the function `name` compute all experts of `model` within the block."""
    configs: list[Any] = [module.config for module in model.modules() if has_experts_interface(module)]
    before = {id(config): (config, config._experts_implementation_internal) for config in configs}
    try:
        for config, _ in before.values():
            config._experts_implementation_internal = name
        yield
    finally:
        for config, implementation in before.values():
            config._experts_implementation_internal = implementation


def first_projection(module: ExpertsModule) -> str:
    """The name of the stack of weights that is applied first to the hidden states."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def activated(module: ExpertsModule, up: torch.Tensor) -> torch.Tensor:
    """Apply the activation, and the gate if there is one, to the first projection's result [rows, outputs]: [rows, width]."""
    return module._apply_gate(up) if module.has_gate else module.act_fn(up)


def finished(module: ExpertsModule, down: torch.Tensor) -> torch.Tensor:
    """The second projection's result [rows, hidden], normalised if the class normalises each expert's."""
    return module.post_expert_norm(down) if getattr(module, "has_post_expert_norm", False) else down
