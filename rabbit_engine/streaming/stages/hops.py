"""Tensors that go from one device to another, whose threads and streams know nothing of each other.

A thread launches work of a device on a stream, and another thread's streams do not wait for it. So whoever hands tensors on waits
until they are computed, and whoever brings them to its device until they are copied: then nobody frees or overwrites what is
still read. That is two waits a hop, each of some ten microseconds beyond the work itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rabbit_engine.streaming.binding.wrapping import move
from rabbit_engine.utils.platform import has_streams


def finish(values: Any) -> None:
    """Wait until the tensors in lists, tuples and dicts are there for every thread."""
    _finish_on(_devices_in(values))


def bring(values: Any, device: torch.device) -> Any:
    """The values on `device`, there for every thread if any came from another accelerator: then their sources may be freed."""
    moved = move(values, device)
    if any(one != device for one in _devices_in(values)):
        _finish_on({device} | _devices_in(values))
    return moved


def use_here(device: torch.device) -> None:
    """Let the calling thread launch on `device` what names none."""
    if has_streams(device):
        torch.get_device_module(device).set_device(device)


def _finish_on(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if has_streams(device):
            torch.get_device_module(device).current_stream(device).synchronize()


def _devices_in(values: Any) -> set[torch.device]:
    return {tensor.device for tensor in _tensors_in(values) if tensor.device.type != "meta"}


def _tensors_in(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif type(values) in (list, tuple, dict):
        for value in values.values() if type(values) is dict else values:
            yield from _tensors_in(value)
