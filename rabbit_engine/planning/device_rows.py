"""Divides a model's layers among the devices of this machine: asks what is free and how fast each is, and plans the stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rabbit_engine.config import StreamConfig
from rabbit_engine.devices import DeviceRow, RowDevice
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.planning.budget import DEFAULT_TOKENS, PLANNED_ROWS, FreeMemory, host_bytes_of, staging_bytes, without_margin
from rabbit_engine.planning.machines import DEFAULT_SECONDS_PER_BYTE, Machine
from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.stages import MOST_ROUNDS, LayeredUnits, StagesPlan, layered_units, plan_stages
from rabbit_engine.planning.stages_plan import row_of_stages
from rabbit_engine.streaming.transfer.measure import measure_products, speeds_for
from rabbit_engine.utils.platform import free_memory_bytes, is_available, pinned_limit_bytes
from rabbit_engine.utils.speeds import Speeds

_ACCELERATOR_SECONDS_PER_BYTE = 1 / 500e9
"""Of an accelerator that is not here."""

_HOP_S = 5e-5
"""Until a device has what another computed: both are waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShare:
    """Bytes of a device's memory for weights and their buffers, and of host memory, if that is apart, for what does not stay."""

    device_bytes: int
    host_bytes: int | None


def plan_row(partition: Partition, row: DeviceRow, stream: StreamConfig) -> StagesPlan:
    """The stages of a model on the devices of `row`. Raises BudgetError, and ConfigurationError if the caller's map names no
    device for a layer."""
    is_given = all(one.nbytes is not None for one in row.devices)
    tokens = stream.max_seq_len or (0 if is_given else DEFAULT_TOKENS)
    units = layered_units(partition, cached_tokens=tokens)
    machines = [_machine(one, units, partition, row, stream) for one in row.devices]
    if row.modules:
        return row_of_stages(units, machines, _mapped(partition, row))
    if row.sequential and (filled := _filled(units, machines)) is not None:
        return row_of_stages(units, machines, filled)
    return plan_stages(units, machines, most_rounds=MOST_ROUNDS)


def shares_of(plan: StagesPlan, partition: Partition, stream: StreamConfig) -> Mapping[str, RowShare]:
    """What each device of a plan of `plan_row` may take. What is missing on a device decides how much of the host's it gets."""
    on_cpu, staging = stream.device.type == "cpu", staging_bytes(partition, stream.device)
    missing = {one.name: sum(stage.streamed_bytes for stage in plan.stages_of(one.name)) for one in plan.machines}
    missing[plan.driver.name] += round(plan.ends.read_bytes(1))
    host = None if on_cpu else host_bytes_of(stream, _free())
    most = max(1, sum(missing.values()))
    return {
        one.name: RowShare(
            device_bytes=(plan.plans_of(one.name)[0].budget.weights_bytes or 0) + (staging if on_cpu else 0),
            host_bytes=None
            if host is None
            else staging + max(0, host - staging * len(plan.machines)) * missing[one.name] // most,
        )
        for one in plan.machines
        if plan.plans_of(one.name)
    }


def _free() -> FreeMemory:
    host = free_memory_bytes(torch.device("cpu"))
    return FreeMemory(device_bytes=0, host_bytes=host, pinned_bytes=pinned_limit_bytes())


def _machine(one: RowDevice, units: LayeredUnits, partition: Partition, row: DeviceRow, stream: StreamConfig) -> Machine:
    """The device as the planner takes it. Weights that lie in host memory come at the rate of its link, others from the disk."""
    on_cpu, is_first = one.device.type == "cpu", one is row.devices[0]
    nbytes = one.nbytes
    if nbytes is None:
        nbytes = without_margin(free_memory_bytes(one.device)) // (len(row.devices) if on_cpu else 1)
        nbytes -= partition.probe.activation_bytes(min(stream.max_seq_len or DEFAULT_TOKENS, PLANNED_ROWS))
    nbytes -= staging_bytes(partition, one.device) if on_cpu else 0
    nbytes -= stream.draft_bytes if is_first else 0
    speeds = stream.speeds or speeds_for(list(partition.weights.entries.values()), one.device, nbytes if on_cpu else None)
    in_host = not on_cpu and units.weights_bytes <= (host_bytes_of(stream, _free()) or 0)
    return Machine(
        name=one.name,
        memory_bytes=max(0, nbytes),
        disk_rate=(speeds.link or speeds.disk) if in_host else _through(speeds),
        seconds_per_byte=_seconds_per_byte(one.device),
        link_rate=float("inf") if on_cpu else speeds.link or float("inf"),
        link_latency_s=0.0 if on_cpu else _HOP_S,
        disk=one.name if in_host else "this machine",
        processors="this machine" if on_cpu else "",
        source=speeds.source,
    )


def _through(speeds: Speeds) -> float:
    """Bytes per second from the disk to a device."""
    return min(speeds.disk, speeds.link) if speeds.link else speeds.disk


def _seconds_per_byte(device: torch.device) -> float:
    if device.type == "cpu":
        return DEFAULT_SECONDS_PER_BYTE
    return 1 / measure_products(device) if is_available(device) else _ACCELERATOR_SECONDS_PER_BYTE


def _filled(units: LayeredUnits, machines: Sequence[Machine]) -> list[tuple[int, range]] | None:
    """Ranges that fill one device after another; None if what stays would not be all."""
    found, first, ends = [], 0, sum(unit.nbytes for unit in units.ends)
    for index, machine in enumerate(machines):
        left, stop = machine.memory_bytes - (ends if index == 0 else 0), first
        while stop < len(units.layers) and left >= (need := sum(one.nbytes for one in units.layers[stop]) + units.cache_bytes):
            left, stop = left - need, stop + 1
        found.append((index, range(first, stop)))
        first = stop
    return found if first == len(units.layers) else None


def _mapped(partition: Partition, row: DeviceRow) -> list[tuple[int, range]]:
    """The ranges that the caller's map gives."""
    names, weights = partition.layout.layers, partition.weights.refs
    unknown = [module for module in row.modules if module and not any(f"{name}.".startswith(f"{module}.") for name in weights)]
    if unknown:
        raise ConfigurationError(
            f"device_map names {unknown[0]!r}, and the model has no such module: its layers are {_some(names)}"
        )
    places = [_place_of(name, row.modules) for name in names]
    order = [one.name for one in row.devices]
    groups = [
        (place, [number for number, _ in group]) for place, group in itertools.groupby(enumerate(places), lambda pair: pair[1])
    ]
    return [(order.index(place), range(layers[0], layers[-1] + 1)) for place, layers in groups]


def _place_of(layer: str, modules: Mapping[str, str]) -> str:
    """The device of a layer: that of the longest name which begins its own."""
    found = [module for module in modules if not module or f"{layer}.".startswith(f"{module}.")]
    if not found:
        raise ConfigurationError(f"device_map names no device for {layer}")
    place = modules[max(found, key=len)]
    if other := [module for module, owner in modules.items() if module.startswith(f"{layer}.") and owner != place]:
        raise ConfigurationError(f"device_map places {layer} on {place} and its part {other[0]} elsewhere: a layer stays whole")
    return place


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) < 2 else f"{names[0]} to {names[-1]}"


def with_probe_share(partition: Partition, share: float) -> Partition:
    """The partition as a device sees it that keeps `share` of each text's cache, and of its layers."""
    probe = partition.probe

    def part(nbytes: int) -> int:
        return math.ceil(nbytes * share)

    windows = replace(probe.windows, token_bytes=part(probe.windows.token_bytes), layers=part(probe.windows.layers))
    tokens, fixed = part(probe.cache_token_bytes), part(probe.cache_fixed_bytes)
    growing = part(probe.growing_layers)
    shown = replace(probe, cache_token_bytes=tokens, cache_fixed_bytes=fixed, windows=windows, growing_layers=growing)
    return replace(partition, probe=shown)
