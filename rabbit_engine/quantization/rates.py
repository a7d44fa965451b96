"""Measures how fast weights are decoded, and multiplied by in the form they are stored in."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rabbit_engine.storage.encoding import Product
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
    stored = _zeros(sample, device)
    out = torch.empty(sample.shape, dtype=sample.dtype, device=device)
    return out.nbytes / _seconds(lambda: encoding.decode(stored, out), device)


def fused_rate(entry: TensorEntry, device: torch.device) -> float | None:
    """Bytes per second, of stored values, at which `device` multiplies one row of states by a matrix like `entry` in the form
    it is stored in; None if it would decode it instead."""
    product = entry.encoding
    if not isinstance(product, Product) or not product.gains(1, entry.dtype, device):
        return None
    stored = _zeros(entry, device)
    states = torch.zeros(1, entry.shape[-1], dtype=entry.dtype, device=device)
    return entry.nbytes / _seconds(lambda: product.linear(states, stored, entry.shape), device)


def _zeros(entry: TensorEntry, device: torch.device) -> list[torch.Tensor]:
    return [torch.zeros(part.shape, dtype=part.dtype, device=device) for part in entry.components]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The better of two runs after a first, which compiles kernels."""
    best = float("inf")
    for round_number in range(3):
        start = time.perf_counter()
        run()
        if has_streams(device):
            torch.get_device_module(device).synchronize(device)
        if round_number:
            best = min(best, time.perf_counter() - start)
    return max(best, 1e-9)


def _sample(entry: TensorEntry) -> TensorEntry:
    """Some rows of a weight or of its first part, or all of it if it cannot be cut."""
    while entry.encoding is None and entry.parts:
        entry = next(part for part in entry.parts if part.is_encoded)
    together = entry.rows_together
    row_values = entry.decoded_bytes // entry.dtype.itemsize // entry.shape[0]
    count = max(1, _SAMPLE_VALUES // (row_values * together)) * together
    return entry.rows(0, count) if count < entry.shape[0] else entry
