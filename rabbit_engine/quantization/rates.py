"""Measures how fast weights are decoded."""

from __future__ import annotations

import time

import torch

from rabbit_engine.storage.encoding import work_bytes
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.utils.platform import has_streams

_SAMPLE_VALUES = 2**22
"""Values that are decoded for a measurement: a few milliseconds of work, more than a processor's caches hold."""


def decode_rate(entry: TensorEntry, device: torch.device) -> float:
    """Bytes per second, of decoded values, at which `device` decodes weights like `entry`: zeros in the form it is stored in,
    the better of two after a first."""
    sample = _sample(entry)
    encoding = sample.encoding
    if encoding is None:
        raise ValueError(f"{entry.name} is not encoded")
    stored = [torch.zeros(part.shape, dtype=part.dtype, device=device) for part in sample.components]
    out = torch.empty(sample.shape, dtype=sample.dtype, device=device)
    work = torch.empty(work_bytes(out.nbytes), dtype=torch.uint8, device=device)
    best = float("inf")
    for round_number in range(3):
        start = time.perf_counter()
        encoding.decode(stored, out, work)
        if has_streams(device):
            torch.get_device_module(device).synchronize(device)
        if round_number:  # the first compiles kernels
            best = min(best, time.perf_counter() - start)
    return out.nbytes / max(best, 1e-9)


def _sample(entry: TensorEntry) -> TensorEntry:
    """Some rows of a weight or of its first part, or all of it if it cannot be cut."""
    while entry.encoding is None and entry.parts:
        entry = next(part for part in entry.parts if part.is_encoded)
    together = entry.rows_together
    row_values = entry.decoded_bytes // entry.dtype.itemsize // entry.shape[0]
    count = max(1, _SAMPLE_VALUES // (row_values * together)) * together
    return entry.rows(0, count) if count < entry.shape[0] else entry
