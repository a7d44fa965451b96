"""Chooses the ring and the accelerator for a device."""

from __future__ import annotations

import torch

from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.accelerator import Accelerator, TorchAccelerator
from rabbit_engine.streaming.transfer.cuda import CudaAccelerator
from rabbit_engine.streaming.transfer.plain_ring import PlainRing
from rabbit_engine.streaming.transfer.ring import Ring
from rabbit_engine.streaming.transfer.stream_ring import StreamRing
from rabbit_engine.utils.platform import has_streams


def claim_ring(device: torch.device, nbytes: int, trace: Trace) -> Ring:
    """A ring of `nbytes` on `device`."""
    if not has_streams(device):
        return PlainRing(device, nbytes, trace)
    return StreamRing(accelerator_of(device), nbytes, trace)


def accelerator_of(device: torch.device) -> Accelerator:
    """A device that has streams."""
    return CudaAccelerator(device) if device.type == "cuda" else TorchAccelerator(device)
