"""How much memory a model may take: the given budget, or the free memory minus a margin. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from rabbit_engine.config import StreamConfig
from rabbit_engine.planning.demand import Demand, encoded_demand, need_bytes
from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.parts import layer_ring_bytes
from rabbit_engine.planning.probe import Probe
from rabbit_engine.planning.tiers import Budget
from rabbit_engine.streaming import STAGING_BYTES, make_unit
from rabbit_engine.streaming.transfer.ring import READERS, STREAM_BUFFERS
from rabbit_engine.streaming.transfer.unit import Extent
from rabbit_engine.utils.platform import has_streams

DEFAULT_TOKENS = 1024
"""The context length whose cache is reserved by default."""

PLANNED_ROWS = 1024
"""Tokens in each part of a long prompt for which memory is reserved."""

_SYSTEM_BYTES = 64 * 2**20
_SYSTEM_SHARE = 1 / 32
"""Bytes left to the process and the system: allocators, kernel buffers, growth."""

_HOST_SHARE = 1 / 8
"""Host memory left free if a device computes: the rest is pinned, and pinned memory cannot be swapped out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """Free bytes on the device and in host memory; at most `pinned_bytes` of the latter may be pinned."""

    device_bytes: int
    host_bytes: int
    pinned_bytes: int


def text_of(probe: Probe, tokens: int, stream: StreamConfig) -> Demand:
    """A text of `tokens`, with the cache that the model is loaded with."""
    text = Demand(tokens, 0)
    return text if stream.cache_dtype is None else encoded_demand(probe, text, held=stream.device.type == "cpu")


def budget_for(partition: Partition, stream: StreamConfig, free: FreeMemory, text: Demand | None = None) -> Budget:
    """The given budget, or the free memory, and what a draft has taken of it, minus a margin for the system.

    Within it, memory is reserved for the cache of `max_seq_len` tokens, or by default of 1,024 if no budget is given; with
    `text`, for one like that.
    """
    given, on_cpu = stream.device_budget_bytes, stream.device.type == "cpu"
    free_bytes = free.device_bytes + (stream.draft_bytes if stream.draft_is_loaded else 0)
    device_bytes = without_margin(free_bytes, _SYSTEM_SHARE) if given is None else given
    tokens = stream.max_seq_len or (DEFAULT_TOKENS if given is None else 0)
    staging = staging_bytes(partition, stream.device)
    room = device_bytes - stream.draft_bytes - (staging if on_cpu else 0)
    if text is None:
        reserved, least_ring = _for_texts(partition, text_of(partition.probe, tokens, stream), room)
    else:
        reserved, least_ring = _for_text(partition, text)
    return Budget(
        device_bytes=device_bytes,
        host_bytes=None if on_cpu else host_bytes_of(stream, free),
        host_staging_bytes=staging,
        reserved_bytes=reserved,
        reserved_by_default=stream.max_seq_len is None,
        draft_bytes=stream.draft_bytes,
        least_ring_bytes=least_ring,
    )


def _for_texts(partition: Partition, text: Demand, room: int) -> tuple[int, int]:
    """Bytes to reserve for a `text`, and for the ring at least: for a prompt at once if `room` holds it beside all
    weights; else, if that takes less, for one in parts, during which a layer stays in the ring."""
    if not text.prompt:
        return 0, 0
    whole = need_bytes(partition.probe, text)
    weights = sum(size.nbytes for size in partition.sizes)
    if not partition.computes_parts or text.prompt <= PLANNED_ROWS or whole + weights <= room:
        return whole, 0
    parts = need_bytes(partition.probe, replace(text, chunk=PLANNED_ROWS))
    ring = layer_ring_bytes(partition.sizes, partition.layout.layers)
    return (parts, ring) if parts + ring < whole else (whole, 0)


def _for_text(partition: Partition, text: Demand) -> tuple[int, int]:
    """Bytes to reserve for it, and for the ring at least."""
    ring = 0 if text.chunk is None else layer_ring_bytes(partition.sizes, partition.layout.layers)
    return need_bytes(partition.probe, text), ring


def texts_in_tiers(partition: Partition, tokens: int, stream: StreamConfig) -> list[Demand]:
    """A text of `tokens` with all layers that can be in tiers there, whole and in pieces, and its prompt in parts where the class
    computes them; only those that take less memory than what is before them, or than a cache in memory."""
    probe = partition.probe
    in_parts = partition.computes_parts and tokens > PLANNED_ROWS
    whole = text_of(probe, tokens, stream)
    kept = [replace(whole, chunk=chunk) for chunk in ((None, PLANNED_ROWS) if in_parts else (None,))]
    found, least = list[Demand](), min(need_bytes(probe, one) for one in kept)
    windows = (0, probe.windows.layers) if probe.windows.layers else (0,)
    for pieces, count in product((False, True) if probe.far_heads else (False,), windows):
        ways = [replace(one, tiered=probe.growing_layers, held=False, pieces=pieces, windows=count) for one in kept]
        text = min(ways, key=partial(need_bytes, probe))
        if need_bytes(probe, text) < least:
            found, least = [*found, text], need_bytes(probe, text)
    return found


def without_margin(free_bytes: int, share: float = _SYSTEM_SHARE) -> int:
    """Free bytes, but those left to the system."""
    return max(0, free_bytes - _SYSTEM_BYTES - int(free_bytes * share))


def staging_bytes(partition: Partition, device: torch.device) -> int:
    """Bytes of the buffers in host memory that reads go through; on a CPU only those of misaligned weights."""
    if device.type == "cpu":
        return READERS * max((chunk.read_bytes for chunk in misaligned(partition, loading=True)), default=0)
    buffers = STREAM_BUFFERS if has_streams(device) else READERS
    buffers += READERS if partition.experts else 0  # on the way into host memory
    return buffers * STAGING_BYTES


def host_bytes_of(stream: StreamConfig, free: FreeMemory) -> int:
    """Bytes of host memory for a device that has its own."""
    given = stream.host_budget_bytes
    host = without_margin(free.host_bytes, _HOST_SHARE) if given is None else given
    return min(host, free.pinned_bytes) if has_streams(stream.device) else host


def misaligned(partition: Partition, *, loading: bool = False) -> list[Extent]:
    """The reads of a pass that need a second copy on the CPU, because they are misaligned in their files. With `loading`,
    also those of loading, where the experts of a layer and a cut head may be read as one."""
    apart = _rows(partition) if loading else _rows(partition) | set(partition.experts)
    units = [unit for name, unit in partition.units.items() if name not in apart]
    experts = [unit for units in partition.experts.values() for unit in units]
    head = (
        [make_unit(partition.head, [partition.weights.entries[partition.head]])] if loading and partition.head is not None else []
    )
    return [chunk for unit in (*units, *experts, *head) for chunk in unit.staged_chunks()]


def _rows(partition: Partition) -> set[str]:
    return {size.name for size in partition.sizes if size.role == "embedding"}
