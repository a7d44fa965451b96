"""Measures the speed of this machine: direct reads from its disk, copies to its device, products there."""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rabbit_engine.errors import DamagedShardError
from rabbit_engine.storage.directio import (
    CHUNK_BYTES,
    PAGE,
    aligned_down,
    aligned_up,
    as_bytes,
    claim_memory,
    damage_as,
    is_direct,
    read_pages,
)
from rabbit_engine.storage.partial import Span, merged, total_bytes
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.streaming.transfer.accelerator import Accelerator
from rabbit_engine.streaming.transfer.claim import accelerator_of
from rabbit_engine.streaming.transfer.ring import READERS
from rabbit_engine.streaming.transfer.unit import Extent
from rabbit_engine.utils.platform import has_streams, is_available
from rabbit_engine.utils.speeds import Speeds

_SAMPLE_CHUNKS = 24
_SMALLEST_SAMPLE = 2**20
_ASSUMED_LINK = 12e9


def speeds_for(entries: Sequence[TensorEntry], device: torch.device, most_bytes: int | None = None) -> Speeds:
    """The links' rates, measured in a fraction of a second and in `most_bytes` of host memory if there is enough to read, or
    else assumed."""
    link = 0.0 if device.type == "cpu" else measure_link(device)
    disk = measure_disk(entries, most_bytes)
    return Speeds(link=link) if disk is None else Speeds(disk=disk, link=link, source="measured")


def measure_disk(entries: Sequence[TensorEntry], most_bytes: int | None = None) -> float | None:
    """Bytes per second of direct reads from the largest file, as many at once as the readers have, the better of two
    samples; None for small files, or if `most_bytes` are too few for a read at the disk's full speed.

    Of weights on several disks, it is the rate of reads from all of them at once, in proportion to what each holds.
    """
    read_bytes = CHUNK_BYTES if most_bytes is None else min(CHUNK_BYTES, aligned_down(most_bytes // READERS) - 2 * PAGE)
    if read_bytes < _SMALLEST_SAMPLE:
        return None
    chunks = _sample(_spans_by_disk(entries), read_bytes)
    if len(chunks) < READERS:
        return None
    read = direct_reads(chunks)
    best = 0.0
    for _ in range(2):  # the first wakes a sleeping disk
        start = time.perf_counter()
        read()
        best = max(best, len(chunks) * read_bytes / (time.perf_counter() - start))
    return best


def _spans_by_disk(entries: Sequence[TensorEntry]) -> list[dict[Path, tuple[Span, ...]]]:
    """Where the weights lie that are here: in which parts of the files of each disk."""
    spans: dict[Path, set[Span]] = {}
    for place in {place for entry in entries for place in entry.places if not place.is_absent}:  # tied weights share a file
        spans.setdefault(place.path, set()).add((place.offset, place.offset + place.nbytes))
    disks: dict[int, dict[Path, tuple[Span, ...]]] = {}
    for path in sorted(spans):
        if path.is_file():
            disks.setdefault(path.stat().st_dev, {})[path] = merged(spans[path], PAGE)
    return list(disks.values())


def _sample(disks: Sequence[Mapping[Path, Sequence[Span]]], read_bytes: int) -> list[Extent]:
    """Reads in the largest file of each disk, as many as its share of all bytes, by turns."""
    sizes = [sum(map(total_bytes, files.values())) for files in disks]
    found: list[tuple[float, Extent]] = []
    for files, nbytes in zip(disks, sizes, strict=True):
        path, parts = max(files.items(), key=lambda item: total_bytes(item[1]))
        pieces = [start for first, stop in parts for start in range(aligned_up(first), stop - read_bytes + 1, CHUNK_BYTES)]
        count = min(round(_SAMPLE_CHUNKS * nbytes / max(1, sum(sizes))), len(pieces))
        at = ((index + 0.5) / count for index in range(count))
        found += [(turn, Extent(path, pieces[int(turn * len(pieces))], read_bytes, 0)) for turn in at]
    return [extent for _, extent in sorted(found, key=lambda row: row[0])]


def direct_reads(chunks: Sequence[Extent]) -> Callable[[], None]:
    """Returns a function that reads chunks like the readers: several at once past the page cache, into small buffers."""
    buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    buffer_bytes = max((chunk.nbytes for chunk in chunks), default=0) + 2 * PAGE
    for _ in range(READERS):
        buffers.put(as_bytes(claim_memory(buffer_bytes).fill_(1)))  # touched, so that page faults are not counted
    direct = {path: is_direct(path) for path in {chunk.path for chunk in chunks}}

    @damage_as(DamagedShardError)
    def read(chunk: Extent) -> None:
        buffer = buffers.get()
        try:
            read_pages(chunk.path, chunk.stamp, chunk.offset, chunk.nbytes, buffer, direct=direct[chunk.path])
        finally:
            buffers.put(buffer)

    def read_all() -> None:
        with ThreadPoolExecutor(READERS, thread_name_prefix="rabbit-loader") as pool:
            for _ in pool.map(read, chunks):
                pass

    return read_all


def measure_link(device: torch.device) -> float:
    """Bytes per second of copies to the device as the ring makes them; an assumption for one without streams, or not here."""
    if not has_streams(device) or not is_available(device):
        return _ASSUMED_LINK
    return copy_rate(accelerator_of(device))


def copy_rate(accelerator: Accelerator, nbytes: int = 2**26) -> float:
    """Bytes per second of a copy from page-locked memory: the best of three."""
    host, there, stream = claim_memory(nbytes).fill_(1), accelerator.claim(nbytes), accelerator.new_stream()
    best = 0.0
    accelerator.pin(host)
    try:
        accelerator.synchronize()
        for _ in range(3):
            start = time.perf_counter()
            accelerator.copy(there, host, stream)
            accelerator.synchronize()
            best = max(best, nbytes / (time.perf_counter() - start))
    finally:
        accelerator.unpin(host)
    return best


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
