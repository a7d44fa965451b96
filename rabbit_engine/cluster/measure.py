"""Measures the machines of a connected cluster: their disks, their products, and their links to the driver."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from rabbit_engine.cluster.connection import require_ray
from rabbit_engine.cluster.machines import ANSWER_S, MachineFacts, answers_of, pinned_to
from rabbit_engine.errors import RabbitError, first_line
from rabbit_engine.planning.machines import Machine
from rabbit_engine.streaming.transfer.disk_rate import measure_disk_rate
from rabbit_engine.streaming.transfer.measure import measure_products
from rabbit_engine.utils.sizes import format_rate

SMALL_BYTES = 16_384
"""A token's states of a model with 8192 of them."""

LARGE_BYTES = 8_000_000
SAMPLE_BYTES = 2**27

_DISK_ROUNDS = 3
_ROUND_TRIPS = 20
_LARGE_ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """What a machine measured, in bytes per second: reads of `folder`'s disk (0 and a `disk_problem` if nothing could be read)
    and bf16 weights in products with one token. `disk` names the disk: nodes that read from one disk share its rate."""

    folder: str
    disk: str
    disk_rate: float
    disk_problem: str
    compute_rate: float

    def __str__(self) -> str:
        disk = format_rate(self.disk_rate, 1) if self.disk_rate else f"not measured ({self.disk_problem})"
        return f"disk of {self.folder} {disk}, products {format_rate(self.compute_rate, 1)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLink:
    """Ray between the driver and a machine: seconds of a round trip of 16 KB in an actor's method, and bytes per second of an
    object of 8 MB that the driver makes and the machine reads."""

    round_trip_s: float
    rate: float

    @property
    def latency_s(self) -> float:
        """Seconds that a message takes besides its bytes, one way."""
        return max(0.0, self.round_trip_s / 2 - SMALL_BYTES / self.rate)

    def __str__(self) -> str:
        return f"round trip of 16 KB {self.round_trip_s * 1e3:.2f} ms, {format_rate(self.rate, 1)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMachine:
    """A machine, what it measured, and its link; the driver's own machine has no link."""

    facts: MachineFacts
    rates: MachineRates
    link: MachineLink | None

    def as_planned(self, memory_bytes: int | None = None) -> Machine:
        """For the planner, with `memory_bytes` for the model, or else all that is free."""
        return Machine(
            name=self.facts.name,
            memory_bytes=self.facts.free_bytes if memory_bytes is None else memory_bytes,
            disk_rate=self.rates.disk_rate,
            seconds_per_byte=1 / self.rates.compute_rate,
            link_rate=self.link.rate if self.link else math.inf,
            link_latency_s=self.link.latency_s if self.link else 0.0,
            disk=self.rates.disk,
            processors=self.facts.kernel,
            processors_share=min(1.0, self.facts.cores / self.facts.processors),
            source="measured",
        )

    def __str__(self) -> str:
        return f"{self.facts}; {self.rates}" + (f"; link to the driver: {self.link}" if self.link else "")


def measure_machines(
    machines: Sequence[MachineFacts], folder: str | None = None, sample_bytes: int = SAMPLE_BYTES
) -> tuple[MeasuredMachine, ...]:
    """Measure `machines`, which must have the driver's versions: see `require_same_versions`.

    Each reads `sample_bytes` three times on the disk of `folder`, a path on that machine (by default its Hub cache): in a large
    file there, or else in a scratch file that it deletes. Nodes of one machine take turns. Raises ClusterError if a machine does
    not answer.
    """
    rates: dict[str, MachineRates] = {}
    for together in _turns(machines):
        rates |= _rates_of(together, folder, sample_bytes)
    links = {machine.name: None if machine.is_driver else measure_machine_link(machine) for machine in machines}
    return tuple(MeasuredMachine(facts=one, rates=rates[one.name], link=links[one.name]) for one in machines)


def measure_machine_link(machine: MachineFacts, timeout_s: float = ANSWER_S) -> MachineLink:
    """Medians of round trips and of large objects, after some untimed. Raises ClusterError if the machine does not answer."""
    ray = require_ray()
    echo = ray.remote(num_cpus=0)(Echo).options(scheduling_strategy=pinned_to(machine.node_id)).remote()
    small = os.urandom(SMALL_BYTES)

    def answer(call: Any) -> None:
        answers_of({machine.name: call}, timeout_s)

    try:
        answer(echo.back.remote(small))
        trips = [_timed(lambda: answer(echo.back.remote(small))) for _ in range(_ROUND_TRIPS + 2)][2:]
        objects = [os.urandom(LARGE_BYTES) for _ in range(_LARGE_ROUNDS + 1)]
        puts = [_timed(lambda data=data: answer(echo.size.remote(ray.put(data)))) for data in objects][1:]
    finally:
        ray.kill(echo)
    trip = statistics.median(trips)
    return MachineLink(round_trip_s=trip, rate=LARGE_BYTES / max(1e-6, statistics.median(puts) - trip / 2))


class Echo:
    """The other end of a link that is measured; an actor."""

    def back(self, data: bytes) -> bytes:
        """The same bytes."""
        return data

    def size(self, data: bytes) -> int:
        """How many bytes have arrived."""
        return len(data)


def measure_here(folder: str | None, cores: int, kernel: str, sample_bytes: int) -> MachineRates:
    """Measure the machine that this runs on; a Ray task. Products use `cores` threads."""
    place = existing_parent(folder)
    try:
        rate, problem = measure_disk_rate(place, sample_bytes, _DISK_ROUNDS).median, ""
    except (RabbitError, OSError) as error:
        rate, problem = 0.0, first_line(error)
    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        products = measure_products(torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    return MachineRates(
        folder=str(place), disk=disk_name(place, kernel), disk_rate=rate, disk_problem=problem, compute_rate=products
    )


def existing_parent(folder: str | None) -> Path:
    """`folder`, by default the Hub's cache; its nearest parent that exists, if it does not."""
    from huggingface_hub import constants

    place = Path(folder or constants.HF_HUB_CACHE).expanduser().absolute()
    return next(one for one in (place, *place.parents) if one.is_dir())


def disk_name(folder: Path, kernel: str) -> str:
    """The disk of a folder: equal on all nodes that read from it, be it of their machine or shared over the network."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.is_relative_to(mount.mountpoint)]
    device = max(mounts, key=lambda mount: len(mount.mountpoint)).device if mounts else ""
    return device if ":" in device or device.startswith("//") else f"{kernel}:{folder.stat().st_dev}"


def _rates_of(machines: Sequence[MachineFacts], folder: str | None, sample_bytes: int) -> dict[str, MachineRates]:
    task = require_ray().remote(num_cpus=0, max_retries=1)(measure_here)
    asked = {
        one.name: task.options(scheduling_strategy=pinned_to(one.node_id)).remote(folder, one.cores, one.kernel, sample_bytes)
        for one in machines
        if one.node_id
    }
    outside = {one.name: measure_here(folder, one.cores, one.kernel, sample_bytes) for one in machines if not one.node_id}
    return answers_of(asked, ANSWER_S) | outside


def _turns(machines: Sequence[MachineFacts]) -> Iterator[list[MachineFacts]]:
    """Machines that may measure at the same time: one node of each machine a turn."""
    of_kernel: dict[str, list[MachineFacts]] = {}
    for machine in machines:
        of_kernel.setdefault(machine.kernel, []).append(machine)
    for turn in itertools.zip_longest(*of_kernel.values()):
        yield [machine for machine in turn if machine is not None]


def _timed(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
