"""The devices that compute, and how much of their memory: the parsing of `device`, `device_map` and `max_memory`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.utils.platform import best_device, find_device, is_accelerator
from rabbit_engine.utils.sizes import parse_bytes

MaxMemory = Mapping[int, int | str] | Mapping[str, int | str] | Mapping[int | str, int | str]
"""`{0: "8GiB", "cpu": "24GiB"}`: bytes by device, each a number or a string."""

_AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def parse_device(device: str | int | torch.device | None, device_map: Any = None) -> torch.device:
    """The one device of `device` or transformers' `device_map` (`"auto"` and similar, a device, or `{"": device}`)."""
    if device_map is None or device_map in _AUTOMATIC_MAPS:
        return find_device(device)
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        if len(places) != 1:
            raise ConfigurationError(
                f'device_map names {len(places)} devices, layers run on one: pass device="cuda:0" and max_memory={{0: "8GiB"}}'
            )
        device_map = places.pop()
    if device is not None and not _same_device(device, device_map):
        raise ConfigurationError(f"device={device!r} and device_map={device_map!r} disagree: pass one of them")
    return find_device(device_map)


def parse_planned_device(device: str | None, max_memory: MaxMemory | None) -> torch.device:
    """A device to plan for: one of this machine, or any other whose size `max_memory` names."""
    if device is None:
        return find_device(None)
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        return find_device(device)  # raises the error that explains
    wanted = torch.device("cpu") if wanted.type == "cpu" else torch.device(wanted.type, wanted.index or 0)
    is_sized = is_accelerator(wanted) and parse_max_memory(max_memory, wanted)[0] is not None
    return wanted if is_sized else find_device(wanted)


def _same_device(first: Any, second: Any) -> bool:
    try:
        devices = {(device.type, device.index or 0) for device in (torch.device(first), torch.device(second))}
    except (RuntimeError, TypeError):
        return False
    return len(devices) == 1


def parse_max_memory(max_memory: MaxMemory | None, device: torch.device) -> tuple[int | None, int | None]:
    """`(device bytes, host bytes)` of transformers' `{0: "8GiB", "cpu": "24GiB"}`; None for each that is not given."""
    if max_memory is None:
        return None, None
    if not isinstance(max_memory, Mapping):
        raise ConfigurationError(f'max_memory={max_memory!r} is not a mapping; write {{0: "8GiB", "cpu": "24GiB"}}')
    budgets = _budgets(max_memory)
    host = budgets.get("cpu")
    if device.type == "cpu" and host is None:
        warnings.warn(
            f'max_memory={dict(max_memory)!r} sets no CPU limit, and the model runs there; add "cpu"',
            UserWarning,
            stacklevel=5,  # the caller of from_pretrained
        )
    own = host if device.type == "cpu" else budgets.get(device.index or 0, budgets.get(device.type))
    return own, host


def _budgets(max_memory: MaxMemory) -> dict[int | str, int]:
    """Bytes by place, in order. Raises ConfigurationError."""
    budgets: dict[int | str, int] = {}
    for name, size in max_memory.items():
        if name == "disk":  # accelerate's offload budget; here weights are always read from disk
            continue
        place = _place(name, f"max_memory[{name!r}]")
        try:
            budgets[place] = parse_bytes(size)
        except ValueError as error:
            raise ConfigurationError(f"max_memory[{place!r}]: {error}") from error
    return budgets


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDevice:
    """A device of a row: `nbytes` of its memory, or what is free. `name` tells CPUs apart, which share one memory."""

    name: str
    device: torch.device
    nbytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """The devices of a machine that share a model's layers, the model's own first.

    Without `is_named` they are all that the machine has. `sequential` fills one after another; `modules` are the devices of
    modules by name, if the caller chose them.
    """

    devices: tuple[RowDevice, ...]
    is_named: bool = True
    sequential: bool = False
    modules: Mapping[str, str] = field(default_factory=dict)


def parse_row(
    device: str | int | torch.device | None, device_map: Any, max_memory: MaxMemory | None, *, planned: bool = False
) -> DeviceRow | None:
    """The devices among which `device_map`, or `max_memory` with a `device` without a number or none, divides the layers; None
    for one device. Planned ones need not be there. Raises ConfigurationError and DeviceUnavailableError."""
    try:
        given = None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        return None  # `parse_device` explains
    if not _can_divide(device_map):
        return None
    kind, own = (given or best_device()).type, _own_name(given)
    budgets, modules = _named_budgets(max_memory, kind), _named_modules(device_map, kind)
    if len(set(modules.values())) < 2 and (isinstance(device_map, Mapping) or (own is not None and device_map is None)):
        return None
    named = list(dict.fromkeys(modules.values())) or [name for name in budgets if name.partition(":")[0] == kind]
    names = named or ([] if device_map is None or planned else _all_names(kind))
    names.sort(key=lambda name: name != own)
    if len(names) < 2 or own not in (None, names[0]):
        return None
    _require_one_kind(names)
    devices = [RowDevice(name=name, device=_row_device(name, planned=planned), nbytes=budgets.get(name)) for name in names]
    return DeviceRow(devices=tuple(devices), is_named=bool(named), sequential=device_map == "sequential", modules=modules)


def _can_divide(device_map: Any) -> bool:
    """Whether it may name several devices."""
    return device_map is None or isinstance(device_map, Mapping) or device_map in _AUTOMATIC_MAPS


def _own_name(given: torch.device | None) -> str | None:
    """The name of a device with a number."""
    if given is None or given.index is None:
        return None
    return str(given) if is_accelerator(given) and given.type != "mps" else str(given).removesuffix(":0")


def _named_budgets(max_memory: MaxMemory | None, kind: str) -> dict[str, int]:
    """Bytes by the names of devices; a number is of that `kind`."""
    budgets = _budgets(max_memory) if isinstance(max_memory, Mapping) else {}
    return {_name_of(place, kind): size for place, size in budgets.items()}


def _named_modules(device_map: Any, kind: str) -> dict[str, str]:
    """The names of devices by module, of a mapping with several places."""
    if not isinstance(device_map, Mapping) or len(set(map(str, device_map.values()))) < 2:
        return {}
    return {str(module): _name_of(_map_place(module, place), kind) for module, place in device_map.items()}


def _all_names(kind: str) -> list[str]:
    """All accelerators of that kind."""
    if not is_accelerator(torch.device(kind)):
        return []
    return [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]


def _require_one_kind(names: Sequence[str]) -> None:
    if len({name.partition(":")[0] for name in names}) > 1:
        raise ConfigurationError(
            f"device_map names {', '.join(names)}: layers run on devices of one kind. Leave out those of the CPU and the disk: "
            "what no device has room for is streamed"
        )


def _map_place(module: str, place: Any) -> int | str:
    if place == "disk":
        raise ConfigurationError(
            'device_map places modules on the "disk": leave them out, or name a device. What no device has room for is streamed'
        )
    return _place(place, f"device_map[{module!r}]={place!r}")


def _name_of(place: int | str, kind: str) -> str:
    return f"{kind if kind != 'cpu' else 'cuda'}:{place}" if isinstance(place, int) else place


def _row_device(name: str, *, planned: bool) -> torch.device:
    """Raises DeviceUnavailableError."""
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, int(index or 0)) if planned else find_device(name)


def _place(place: int | str | torch.device, given: str) -> int | str:
    """0 for `0`, `"0"`, `"cuda:0"`, `"xpu:0"` and `torch.device("cuda:0")`; `"cpu"`, `"cpu:1"` and `"mps"` unchanged.
    Raises ConfigurationError for others; it says what was `given`."""
    name = str(place).removeprefix("cuda:").removeprefix("xpu:").removesuffix(":0")
    if name.isdigit():
        return int(name)
    if name not in ("cpu", "mps") and not re.fullmatch(r"cpu:\d+", name):
        raise ConfigurationError(f'{given} is not a device; write 0, "cuda:0" or "cpu"')
    return name
