"""How much memory weights may take: the given budget, or the free memory minus a margin. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rabbit_engine.config import StreamConfig
from rabbit_engine.planning.demand import Demand, need_bytes
from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.probe import Probe
from rabbit_engine.planning.tiers import Budget
from rabbit_engine.streaming import STAGING_BYTES, make_unit
from rabbit_engine.streaming.transfer.ring import READERS, STREAM_BUFFERS
from rabbit_engine.streaming.transfer.unit import Extent
from rabbit_engine.utils.platform import has_streams

DEFAULT_TOKENS = 1024
"""The context length whose cache is reserved by default."""

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


def reserved_bytes(probe: Probe, tokens: int) -> int:
    """Bytes that a context of `tokens` needs in addition to the weights: its KV cache and the activations of such a prompt."""
    return need_bytes(probe, Demand(tokens, 0))


def budget_for(partition: Partition, stream: StreamConfig, free: FreeMemory) -> Budget:
    """The given budget, or the free memory minus a margin for the cache, activations and the system.

    A given budget covers weights and their buffers, and with `max_seq_len` also the cache of that many tokens.
    """
    reserved = reserved_bytes(partition.probe, stream.max_seq_len or DEFAULT_TOKENS)
    given = stream.device_budget_bytes
    if given is not None:
        reserved = reserved if stream.max_seq_len else 0
        device = max(0, given - reserved)
    else:
        device = max(0, free.device_bytes - reserved - _SYSTEM_BYTES - int(free.device_bytes * _SYSTEM_SHARE))
    if stream.device.type == "cpu":
        return Budget(
            device_bytes=device,
            host_staging_bytes=READERS * max((chunk.read_bytes for chunk in misaligned(partition, loading=True)), default=0),
            reserved_bytes=reserved,
            given_bytes=given,
        )
    buffers = STREAM_BUFFERS if has_streams(stream.device) else READERS
    buffers += READERS if partition.experts else 0  # on the way into host memory
    return Budget(
        device_bytes=device,
        host_bytes=_host_bytes(stream, free),
        host_staging_bytes=buffers * STAGING_BYTES,
        reserved_bytes=reserved,
        given_bytes=given,
    )


def _host_bytes(stream: StreamConfig, free: FreeMemory) -> int:
    own = stream.host_budget_bytes
    host = own if own is not None else max(0, free.host_bytes - _SYSTEM_BYTES - int(free.host_bytes * _HOST_SHARE))
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
