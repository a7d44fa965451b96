"""How much memory weights may take, and how fast the links are: asked of the machine, or given by the caller."""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rabbit_engine.config import StreamConfig
from rabbit_engine.errors import DamagedShardError
from rabbit_engine.planning.demand import Demand, need_bytes
from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.plan import Budget
from rabbit_engine.planning.probe import Probe
from rabbit_engine.storage.directio import CHUNK_BYTES, PAGE, aligned_down, as_bytes, buffered_reason, claim_memory, read_pages
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.streaming import STAGING_BYTES, make_unit
from rabbit_engine.streaming.transfer.ring import READERS
from rabbit_engine.streaming.transfer.unit import Extent
from rabbit_engine.utils.platform import free_memory_bytes, pinned_limit_bytes
from rabbit_engine.utils.sizes import format_bytes
from rabbit_engine.utils.speeds import Speeds

DEFAULT_TOKENS = 1024
"""The length whose cache is set aside where nobody asked for one."""

_SYSTEM_BYTES = 64 * 2**20
_SYSTEM_SHARE = 1 / 32
"""Left to the process and the system: allocators, kernels' buffers, what grows."""

_HOST_SHARE = 1 / 8
"""Of host memory beside a device: it is pinned, and what is pinned cannot be swapped out for anybody."""

_SAMPLE_CHUNKS = 24
_SMALLEST_SAMPLE = 2**20
_ASSUMED_LINK = 12e9


def reserved_bytes(probe: Probe, tokens: int) -> int:
    """What a context of `tokens` takes beside the weights: its KV cache, and the activations of a prompt of that length."""
    return need_bytes(probe, Demand(tokens, 0))


def budget_for(partition: Partition, stream: StreamConfig) -> Budget:
    """The budget that was given, or what is free now less a margin for the cache, activations and the system.

    A given one is for weights and what they pass through, unless `max_seq_len` asks for room for tokens in it.
    """
    reserved = reserved_bytes(partition.probe, stream.max_seq_len or DEFAULT_TOKENS)
    given = stream.device_budget_bytes
    if given is not None:
        reserved = reserved if stream.max_seq_len else 0
        device = max(0, given - reserved)
    else:
        free = free_memory_bytes(stream.device)  # what is asked of a device that is not here is refused before
        device = max(0, free - reserved - _SYSTEM_BYTES - int(free * _SYSTEM_SHARE))
    if stream.device.type == "cpu":
        return Budget(
            device_bytes=device,
            host_staging_bytes=READERS * max((chunk.read_bytes for chunk in _misaligned(partition, loading=True)), default=0),
            reserved_bytes=reserved,
            given_bytes=given,
        )
    buffers = 2 * READERS if stream.device.type == "cuda" else READERS
    buffers += READERS if partition.experts else 0  # on their way into host memory
    return Budget(
        device_bytes=device,
        host_bytes=_host_bytes(stream),
        host_staging_bytes=buffers * STAGING_BYTES,
        reserved_bytes=reserved,
        given_bytes=given,
    )


def _host_bytes(stream: StreamConfig) -> int:
    cpu = torch.device("cpu")
    free = free_memory_bytes(cpu)
    own = stream.host_budget_bytes
    host = own if own is not None else max(0, free - _SYSTEM_BYTES - int(free * _HOST_SHARE))
    return min(host, pinned_limit_bytes()) if stream.device.type == "cuda" else host


def _misaligned(partition: Partition, *, loading: bool = False) -> list[Extent]:
    """The reads of a pass that are copied once more on the CPU, because their files hold them off the boundaries they need;
    or also those of `loading`, when the experts of a layer and a head that is cut may be read as one."""
    apart = _rows(partition) if loading else _rows(partition) | set(partition.experts)
    units = [unit for name, unit in partition.units.items() if name not in apart]
    experts = [unit for units in partition.experts.values() for unit in units]
    head = (
        [make_unit(partition.head, [partition.weights.entries[partition.head]])] if loading and partition.head is not None else []
    )
    return [chunk for unit in (*units, *experts, *head) for chunk in unit.staged_chunks()]


def _rows(partition: Partition) -> set[str]:
    return {size.name for size in partition.sizes if size.role == "embedding"}


def read_notes(partition: Partition, device: torch.device) -> list[str]:
    """What the reader of a plan should know of the files: how they are read, what must be realigned."""
    paths = {place.path for entry in partition.weights.entries.values() for place in entry.places}
    reasons = {buffered_reason(path) for path in paths if path.is_file()}
    notes = [f"reads go through the page cache: {reason}" for reason in sorted(filter(None, reasons))]
    moved = sum(chunk.nbytes for chunk in _misaligned(partition)) if device.type == "cpu" else 0
    if moved:
        why = "off a 16-byte boundary in their files, or joined from parts"
        notes.append(f"{format_bytes(moved)} are moved once more while they are read: {why}")
    return notes


def whole_experts_notes(partition: Partition) -> list[str]:
    """Which classes of experts move whole, all of a layer's for every token, and why."""
    return [
        f"the experts of {name} move whole, not as they are routed to: {why}" for name, why in partition.whole_experts.items()
    ]


def speeds_for(entries: Sequence[TensorEntry], device: torch.device, most_bytes: int | None = None) -> Speeds:
    """The links' rates, measured in a fraction of a second and in `most_bytes` of host memory where there is enough to read,
    else assumed."""
    link = 0.0 if device.type == "cpu" else measure_link(device)
    disk = measure_disk(entries, most_bytes)
    return Speeds(link=link) if disk is None else Speeds(disk=disk, link=link, source="measured")


def measure_disk(entries: Sequence[TensorEntry], most_bytes: int | None = None) -> float | None:
    """Bytes a second of direct reads, as many at once as the readers have, from the largest file, the better
    of two samples; None for small ones, or where `most_bytes` hold no read that a disk is fast with."""
    sizes: Counter[Path] = Counter()
    for place in {place.name: place for entry in entries for place in entry.places}.values():  # tied weights share theirs
        if place.path.is_file():
            sizes[place.path] += place.nbytes
    if not sizes:
        return None
    path, nbytes = sizes.most_common(1)[0]
    count = min(_SAMPLE_CHUNKS, nbytes // CHUNK_BYTES)
    read_bytes = CHUNK_BYTES if most_bytes is None else min(CHUNK_BYTES, aligned_down(most_bytes // READERS) - 2 * PAGE)
    if count < READERS or read_bytes < _SMALLEST_SAMPLE:
        return None
    step = aligned_down(nbytes // count)
    read = direct_reads([Extent(path, index * step, read_bytes, 0) for index in range(count)])
    best = 0.0
    for _ in range(2):  # the first wakes a disk that sleeps
        start = time.perf_counter()
        read()
        best = max(best, count * read_bytes / (time.perf_counter() - start))
    return best


def direct_reads(chunks: Sequence[Extent]) -> Callable[[], None]:
    """Read chunks as the readers do, several at once past the page cache, into small buffers: what this disk gives."""
    buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    buffer_bytes = max((chunk.nbytes for chunk in chunks), default=0) + 2 * PAGE
    for _ in range(READERS):
        buffers.put(as_bytes(claim_memory(buffer_bytes).fill_(1)))  # touched: faults are not the disk's
    direct = {path: buffered_reason(path) is None for path in {chunk.path for chunk in chunks}}

    def read(chunk: Extent) -> None:
        buffer = buffers.get()
        try:
            read_pages(chunk.path, chunk.stamp, chunk.offset, chunk.nbytes, buffer, DamagedShardError, direct=direct[chunk.path])
        finally:
            buffers.put(buffer)

    def read_all() -> None:
        with ThreadPoolExecutor(READERS, thread_name_prefix="rabbit-loader") as pool:
            for _ in pool.map(read, chunks):
                pass

    return read_all


def measure_link(device: torch.device) -> float:
    """Bytes a second of a pinned copy to a CUDA device: the best of three of 64 MiB; an assumption for other devices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _ASSUMED_LINK
    host = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(2**26, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        best = max(best, host.nbytes / (time.perf_counter() - start))
    return best
