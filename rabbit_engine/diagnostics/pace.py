"""Estimates the speed of well-known models on a machine with given rates: plans their shapes like any model. Reads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from rabbit_engine.config import CompressionConfig, StreamConfig
from rabbit_engine.errors import BudgetError
from rabbit_engine.planning.budget import DEFAULT_TOKENS, FreeMemory, budget_for
from rabbit_engine.planning.decide import find_free_memory
from rabbit_engine.planning.partition import Partition, partition_model
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.tiers import Budget, UnitSize
from rabbit_engine.planning.weights import unread_entries
from rabbit_engine.utils.speeds import Speeds

Shape = Mapping[str, Any]


def _shape(kind: str, hidden: int, layers: int, inner: int, heads: int, kv_heads: int, vocabulary: int, **more: int) -> Shape:
    """A config of transformers' `model_type` `kind`, with the values that determine sizes."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "moe_intermediate_size" if "num_experts" in more else "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **more,
    }


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128}

KNOWN_SHAPES: Mapping[str, Shape] = {
    "Qwen2.5-7B": _shape("qwen2", 3584, 28, 18944, 28, 4, 152064),
    "Qwen3-30B-A3B": _shape("qwen3_moe", 2048, 48, 768, 32, 4, 151936, **_EXPERTS),
    "Qwen2.5-32B": _shape("qwen2", 5120, 64, 27648, 40, 8, 152064),
    "Qwen2.5-72B": _shape("qwen2", 8192, 80, 29568, 64, 8, 152064),
    "Llama-3.1-405B": _shape("llama", 16384, 126, 53248, 128, 8, 128256),
}
"""From their config.json. None of them ties its head to its embedding."""


@dataclass(frozen=True, slots=True)
class Products:
    """Bytes per second of stored weights that products with one token read: `bf16`, and `four_bit` ones."""

    bf16: float
    four_bit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The memory and time of a bf16 model on this machine.

    It needs `smallest_bytes` of memory with a text of 1024 tokens. `token_s` is at best (as many experts cached as possible)
    and at worst, None if free memory is below the smallest; `bound` is what limits a token at worst. `four_bit_bytes` and
    `four_bit_token_s` are those of `compression="4bit"`, None if free memory is below its smallest.
    """

    model: str
    parameters: int
    weights_bytes: int
    smallest_bytes: int
    pass_bytes: int | None
    token_s: tuple[float, float] | None
    bound: str
    four_bit_bytes: int
    four_bit_token_s: float | None


def estimate_paces(
    device: torch.device, speeds: Speeds, products: Products, shapes: Mapping[str, Shape] = KNOWN_SHAPES
) -> tuple[Pace, ...]:
    """Each of `shapes` on `device` within the memory free now."""
    stream = StreamConfig(device=device, speeds=speeds)
    return tuple(estimate_pace(name, shape, stream, products) for name, shape in shapes.items())


def estimate_pace(name: str, shape: Shape, stream: StreamConfig, products: Products) -> Pace:
    """The plan of `shape` within the budget of `stream`, in seconds per token."""
    partition, four_bit = _partitions(AutoConfig.for_model(**shape), stream.device.type)
    free = find_free_memory(stream)
    budget = budget_for(partition, stream, free)
    plan, four_bit_plan = _plan(partition.sizes, stream, budget), _plan(four_bit.sizes, stream, budget)
    compute_s = _active_bytes(partition.sizes) / products.bf16
    four_bit_s = _active_bytes(four_bit.sizes) / products.four_bit
    return Pace(
        model=name,
        parameters=sum(_elements(entry.shape) for entry in partition.weights.entries.values()),
        weights_bytes=sum(size.nbytes for size in partition.sizes),
        smallest_bytes=_smallest_bytes(partition, stream, free),
        pass_bytes=plan.pass_bytes if plan else None,
        token_s=(max(plan.least_pass_s, compute_s), max(plan.pass_s, compute_s)) if plan else None,
        bound="memory" if plan is None else plan.bound if plan.pass_s > compute_s else "compute",
        four_bit_bytes=sum(size.nbytes for size in four_bit.sizes),
        four_bit_token_s=max(four_bit_plan.pass_s, four_bit_s) if four_bit_plan else None,
    )


def _partitions(config: PretrainedConfig, device_type: str) -> tuple[Partition, Partition]:
    """The partition of a model in bf16, and in four bits."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    compression = CompressionConfig(method="4bit", device_type=device_type)
    plain = partition_model(model, *unread_entries(model))
    return plain, partition_model(model, *unread_entries(model, compression), probe=plain.probe)


def _plan(sizes: Sequence[UnitSize], stream: StreamConfig, budget: Budget) -> Plan | None:
    """None if the budget is too small."""
    try:
        return place(sizes, str(stream.device), budget, stream.speeds or Speeds())
    except BudgetError:
        return None


def _smallest_bytes(partition: Partition, stream: StreamConfig, free: FreeMemory) -> int:
    """The smallest budget with which texts of 1024 tokens run, from the error for an empty one."""
    empty = replace(stream, device_budget_bytes=0, max_seq_len=stream.max_seq_len or DEFAULT_TOKENS)
    try:
        place(partition.sizes, str(stream.device), replace(budget_for(partition, empty, free), host_bytes=None))
    except BudgetError as error:
        return error.smallest_bytes
    return 0


def _active_bytes(sizes: Sequence[UnitSize]) -> int:
    """Bytes read by the products of one token: of experts only those it uses, of an embedding none."""
    routed = sum(size.routing.used * size.routing.nbytes for size in sizes if size.routing)
    return routed + sum(size.nbytes for size in sizes if size.role in ("streamed", "resident"))


def _elements(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
