"""Computes a sparse layer one expert at a time, as they arrive: a function of transformers' experts interface.

The interface lets a module's config choose who computes `experts(hidden_states, top_k_index, top_k_weights)`. Only modules
whose experts are streamed have a config that chooses this function: others keep the one that transformers chose, which
`generate` may change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rabbit_engine.errors import StreamingError
from rabbit_engine.streaming.binding.binding import Binding
from rabbit_engine.streaming.binding.packed import PackedWeight
from rabbit_engine.streaming.binding.unit_weights import UnitWeights
from rabbit_engine.streaming.binding.wrapping import refuse_gradients
from rabbit_engine.streaming.transfer.experts import ExpertCache
from rabbit_engine.streaming.transfer.slots import HALF_LIFE_TOKENS
from rabbit_engine.streaming.transfer.unit import Unit
from rabbit_engine.transformers_bridge.experts import (
    ExpertsModule,
    activated,
    choose_experts_function,
    finished,
    first_projection,
    register_experts_function,
)

IMPLEMENTATION = "rabbit_engine"
"""The name in the interface."""


class RoutedExperts:
    """The experts `units` of a module, whose weights `cache` reads on demand.

    `weights` are those of each unit.
    """

    def __init__(
        self, name: str, units: Sequence[Unit], cache: ExpertCache, binding: Binding, weights: Sequence[UnitWeights]
    ) -> None:
        self._name, self._units, self._cache, self._binding, self._unit_weights = name, units, cache, binding, weights

    def run(
        self, module: ExpertsModule, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states` [tokens, hidden], `top_k_index` and `top_k_weights` [tokens, experts a token]: [tokens, hidden].

        Each expert's results are stored separately and summed at the end, in the order of `top_k_index`: the bits do not
        depend on the order of arrival. The rows of an expert have the order of transformers' `grouped_mm` (`torch.sort` of
        the indices, which is not stable), as kernels round by the position of a row.
        """
        refuse_gradients(self._name, module, (hidden_states, top_k_weights), {})
        tokens, used = top_k_index.shape
        order = torch.sort(top_k_index.reshape(-1)).indices
        chosen = top_k_index.cpu()  # the only wait for a device
        counts = torch.bincount(chosen.reshape(-1), minlength=module.num_experts)[: module.num_experts].tolist()
        starts = list(itertools.accumulate(counts, initial=0))
        results: torch.Tensor | None = None
        length = self._binding.passes.length_of(tokens)
        uses = decayed_uses(chosen, counts, length)
        with self._binding.passes.alone(), self._cache.lend(self._name, uses, length) as arrivals:
            for index, memory in arrivals:
                with self._binding.computing(self._units[index].name), self._weights(index, memory) as weights:
                    pairs = order[starts[index] : starts[index + 1]]
                    states = hidden_states[pairs // used]
                    result = run_expert(module, weights, states, len(order))
                    if results is None:  # an index past the last expert selects none and adds nothing
                        results = result.new_zeros(len(order), result.shape[-1])
                    results[pairs] = result
        if results is None:
            return torch.zeros_like(hidden_states)
        weighted = results * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, used, -1).sum(dim=1).to(hidden_states.dtype)

    @contextmanager
    def _weights(self, index: int, memory: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """An expert's weights under the names of the module's stacks, while the block runs."""
        unit, weights = self._units[index], self._unit_weights[index]
        with weights.using(memory):
            names = (weight.entry.name.rpartition("[")[0].rpartition(".")[2] for weight in unit.weights)
            yield {name: _of_one(view) for name, view in zip(names, weights.views(memory), strict=True)}


def _of_one(view: torch.Tensor) -> torch.Tensor:
    """The weight of one expert in a stack of one; a packed weight has no dimension of experts."""
    return view if isinstance(view, PackedWeight) else view[0]


def decayed_uses(top_k_index: torch.Tensor, counts: Sequence[int], length: int) -> dict[int, float]:
    """How often each expert is used, `counts` times in all, weighted as of the end of the pass.

    `top_k_index` [sequences * length, experts a token] is on the CPU.
    """
    tokens, used = top_k_index.shape
    uses: Sequence[float] = counts
    if length > 1:
        ages = (length - 1 - torch.arange(tokens, device="cpu") % length) / HALF_LIFE_TOKENS
        weights = torch.exp2(-ages).repeat_interleave(used)
        uses = torch.bincount(top_k_index.reshape(-1), weights, minlength=len(counts)).tolist()
    return {index: uses[index] for index, count in enumerate(counts) if count}


def run_expert(module: ExpertsModule, weights: Mapping[str, torch.Tensor], states: torch.Tensor, all_rows: int) -> torch.Tensor:
    """One expert on `states` [rows, hidden], as the interface defines: up (and gate), activation, down, perhaps a norm.

    `all_rows` is the number of rows of all experts, which transformers' `grouped_mm` passes through the gate together.
    """
    up = _project(module, weights, first_projection(module), states)
    alone = module.has_gate and len(up) == 1 < all_rows
    # half of one row is contiguous, half of several is not: GELU has a kernel for each
    inner = activated(module, up.repeat(2, 1))[:1] if alone else activated(module, up)
    return finished(module, _project(module, weights, "down_proj", inner))


def _project(module: ExpertsModule, weights: Mapping[str, torch.Tensor], name: str, states: torch.Tensor) -> torch.Tensor:
    """In the dtype of the weights, also under autocast, like transformers' grouped kernels."""
    matrix = weights[name]
    states = states.to(matrix.dtype)
    with torch.autocast(states.device.type, enabled=False):
        result = states @ matrix if module.is_transposed else functional.linear(states, matrix)
    return result + weights[f"{name}_bias"] if module.has_bias else result


def run_routed(
    module: ExpertsModule, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function of the interface: delegates to the module's `RoutedExperts`."""
    experts: RoutedExperts | None = getattr(module, "routed_experts", None)
    if experts is None:
        raise StreamingError(
            f'experts_implementation="{IMPLEMENTATION}" is for models that stream: load this one with rabbit_engine.AutoModel, '
            "or choose another implementation"
        )
    return experts.run(module, hidden_states, top_k_index, top_k_weights)


register_experts_function(IMPLEMENTATION, run_routed)


def adapts_routed(model: nn.Module) -> bool:
    """Whether a PEFT adapter is set on a stack of streamed experts: it would change all of them at once."""
    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    return any(hasattr(inside, "routed_experts") for wrapper in wrappers for inside in wrapper.modules())


def route(module: nn.Module, experts: RoutedExperts) -> None:
    """Let `experts` compute the forward of `module`."""
    chosen: Any = module
    chosen.routed_experts = experts
    choose_experts_function(chosen, IMPLEMENTATION)
