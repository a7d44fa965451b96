"""Estimates the speed of well-known models on a machine with given rates: plans their shapes like any model. Reads nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from rabbit_engine.config import StreamConfig
from rabbit_engine.errors import BudgetError
from rabbit_engine.planning.budget import DEFAULT_TOKENS, FreeMemory, budget_for
from rabbit_engine.planning.decide import find_free_memory
from rabbit_engine.planning.partition import Partition, partition_model, unread_entries
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.tiers import Budget, UnitSize
from rabbit_engine.utils.speeds import Speeds

_FOUR_BIT_SHARE = 4.5 / 16
"""Per bf16 weight: four bits, and a float32 scale for every 64 weights."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The memory and time of a bf16 model on this machine.

    It needs `smallest_bytes` of memory with a text of 1024 tokens. `token_s` is at best (as many experts cached as possible)
    and at worst, None if free memory is below the smallest; `bound` is what limits a token at worst. `four_bit_bytes` and
    `four_bit_token_s` are for a checkpoint of 4.5 bits a weight, which this version cannot run.
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
    device: torch.device, speeds: Speeds, products: float, shapes: Mapping[str, Shape] = KNOWN_SHAPES
) -> tuple[Pace, ...]:
    """Each of `shapes` on `device` within the memory free now; `products` is the result of `measure_products`."""
    stream = StreamConfig(device=device, speeds=speeds)
    return tuple(estimate_pace(name, shape, stream, products) for name, shape in shapes.items())


def estimate_pace(name: str, shape: Shape, stream: StreamConfig, products: float) -> Pace:
    """The plan of `shape` within the budget of `stream`, in seconds per token."""
    partition, free = _partition(AutoConfig.for_model(**shape)), find_free_memory(stream)
    budget = budget_for(partition, stream, free)
    four_bit = [_in_four_bits(size) for size in partition.sizes]
    plan = _plan(partition.sizes, stream, budget)
    four_bit_plan = _plan(four_bit, stream, budget)
    compute_s = _active_bytes(partition.sizes) / products
    return Pace(
        model=name,
        parameters=sum(_elements(entry.shape) for entry in partition.weights.entries.values()),
        weights_bytes=sum(size.nbytes for size in partition.sizes),
        smallest_bytes=_smallest_bytes(partition, stream, free),
        pass_bytes=plan.pass_bytes if plan else None,
        token_s=(max(plan.least_pass_s, compute_s), max(plan.pass_s, compute_s)) if plan else None,
        bound="memory" if plan is None else plan.bound if plan.pass_s > compute_s else "compute",
        four_bit_bytes=sum(size.nbytes for size in four_bit),
        four_bit_token_s=four_bit_plan.pass_s if four_bit_plan else None,
    )


def measure_products(device: torch.device) -> float:
    """Bytes of bf16 weights per second read by products with one token on `device`: the median of five of 256 MiB."""
    weight = torch.ones(2**13, 2**14, dtype=torch.bfloat16, device=device)
    token = torch.ones(1, 2**14, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(token, weight)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return weight.nbytes / statistics.median(seconds[1:])


def _partition(config: PretrainedConfig) -> Partition:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return partition_model(model, *unread_entries(model))


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


def _in_four_bits(size: UnitSize) -> UnitSize:
    """The same weights in 4.5 bits each if they are large: embeddings and norms keep their own dtype."""
    if size.role not in ("streamed", "experts"):
        return size
    routing = size.routing and replace(
        size.routing, nbytes=_shrunk(size.routing.nbytes), read_bytes=_shrunk(size.routing.read_bytes)
    )
    return replace(size, nbytes=_shrunk(size.nbytes), read_bytes=_shrunk(size.disk_bytes), routing=routing)


def _shrunk(nbytes: int) -> int:
    return round(nbytes * _FOUR_BIT_SHARE)


def _elements(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
