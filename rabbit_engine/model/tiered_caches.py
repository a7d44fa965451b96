"""Caches whose keys and values do not fit where the model computes: where they may lie, and how many of their layers do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.runtime import Runtime
from rabbit_engine.planning.demand import Demand, Ways, tier_bytes
from rabbit_engine.planning.texts import disk_room, texts_folder
from rabbit_engine.streaming import BlockHome, TextStates
from rabbit_engine.transformers_bridge.forwards import cache_of
from rabbit_engine.transformers_bridge.generation import Asked
from rabbit_engine.transformers_bridge.tiered import TieredCache, growing_indices
from rabbit_engine.utils.platform import free_memory_bytes

_CPU = torch.device("cpu")

_KEPT_FREE = 0.1
"""The fraction of free host memory that caches leave."""


def ways_of(runtime: Runtime, *, parts: bool, tiers: bool) -> Ways:
    """How a text that does not fit may be computed, if its prompt may be in `parts` and its cache in `tiers`; caches of the dtype
    that the model was loaded with."""
    encoded = tiers and runtime.assembly.cache_dtype is not None
    return Ways(parts, tier_room(runtime) if tiers else 0, encoded, encoded and runtime.device.type == "cpu")


def require_cache_dtype(runtime: Runtime) -> None:
    """Raise ConfigurationError for a `cache_dtype` that the model's caches cannot have."""
    wanted = runtime.assembly.cache_dtype
    if wanted is not None and not _can_tier(runtime):
        raise ConfigurationError(
            f"cache_dtype={wanted!r} is for layers that keep the keys and values of all tokens, and none is known "
            f"in the cache of {runtime.architecture.cls.__name__}: leave it out"
        )


def may_tier(given: Mapping[str, Any], asked: Asked) -> bool:
    """Whether `generate` with the keywords `given` and these settings makes a dynamic cache."""
    if cache_of(given) is not None or asked("use_cache") is False:
        return False
    return asked("cache_implementation") in (None, "dynamic")


def tier_room(runtime: Runtime) -> int:
    """Bytes that caches may take beside the device: of host memory if the device has its own, and of disk; 0 for a model whose
    caches cannot lie there."""
    return max(_host_room(runtime), disk_room()) if _can_tier(runtime) else 0


def _can_tier(runtime: Runtime) -> bool:
    return runtime.partition.probe.growing_layers > 0 and not runtime.architecture.config.is_encoder_decoder


def make_cache(runtime: Runtime, demand: Demand) -> DynamicCache | None:
    """A cache with `demand.tiered` layers in tiers, spread over the model's depth; None if there are none. Raises
    CacheStorageError if its file cannot be made."""
    if not demand.tiered:
        return None
    config = runtime.architecture.config.get_text_config()
    growing = growing_indices(DynamicCache(config=config).layers)
    count = min(demand.tiered, len(growing))
    chosen = {growing[index * len(growing) // count] for index in range(count)}
    in_memory = demand.held or (
        runtime.device.type != "cpu" and tier_bytes(runtime.partition.probe, demand) <= _host_room(runtime)
    )
    home = BlockHome(None if in_memory else texts_folder(), encoded=demand.encoded)
    return TieredCache(config, chosen, TextStates(home, demand.prompt + demand.answer))


def in_shared_blocks(runtime: Runtime, demand: Demand) -> Demand:
    """`demand` of a text that others are to continue. What fits on a CPU lies in blocks in memory, which its copies share: whole
    layers are copied with the first token that a copy adds. Other devices keep them whole: blocks would lie apart."""
    layers = runtime.partition.probe.growing_layers
    if demand.tiered or not layers or runtime.device.type != "cpu":
        return demand
    return replace(demand, tiered=layers, held=True)


def make_shared_cache(runtime: Runtime, demand: Demand) -> DynamicCache:
    """A cache for a text that others are to continue. Raises CacheStorageError if its file cannot be made."""
    return make_cache(runtime, demand) or DynamicCache(config=runtime.architecture.config.get_text_config())


def _host_room(runtime: Runtime) -> int:
    """Of the host's memory, for a device that has its own."""
    return 0 if runtime.device.type == "cpu" else int(free_memory_bytes(_CPU) * (1 - _KEPT_FREE))
