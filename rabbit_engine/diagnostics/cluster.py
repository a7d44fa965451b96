"""Examines the machines of a cluster: versions, authentication, memory, disks, products, links, as findings with advice."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rabbit_engine.cluster.connection import connect
from rabbit_engine.cluster.machines import MachineFacts, gather_facts, own_versions, version_differences
from rabbit_engine.cluster.measure import MachineLink, MeasuredMachine, measure_machines
from rabbit_engine.diagnostics.doctor import SLOW_DISK
from rabbit_engine.diagnostics.finding import Examination, Finding, Number
from rabbit_engine.streaming.transfer.disk_rate import SAMPLE_BYTES
from rabbit_engine.utils.sizes import format_bytes, format_rate

_LITTLE_MEMORY_BYTES = 10**9
"""A process with torch, and a few layers."""

_SLOW_LINK = 60e6
"""Bytes per second. A cable of 1 Gbit/s gives about 100 million by Ray."""

_SLOW_ROUND_TRIP_S = 0.005
"""An idle machine answers in 1 ms; a token makes as many round trips as there are stages."""

_FAR_BELOW = 0.5
"""A machine with less than this share of the others' median is called slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterDiagnosis(Examination):
    """The cluster at `address`. Machines with other versions than the driver's are not in `measured`."""

    address: str
    machines: tuple[MachineFacts, ...]
    measured: tuple[MeasuredMachine, ...]

    def facts(self) -> dict[str, Any]:
        """For JSON; rates are in bytes per second."""
        return {
            "cluster": self.address,
            "machines": [asdict(machine) for machine in self.machines],
            "measured": [asdict(machine) for machine in self.measured],
        }


def examine_cluster(address: str, folder: str | None = None, sample_bytes: int = SAMPLE_BYTES) -> ClusterDiagnosis:
    """Connect, and ask and measure every machine. Each reads the disk of its `folder`, by default of its Hub cache.

    Raises ClusterError if none answers at `address`, or one of its machines does not.
    """
    ray = connect(address)
    machines, own = gather_facts(), own_versions()
    same = [machine for machine in machines if not version_differences([machine], own)]
    measured = measure_machines(same, folder, sample_bytes)
    findings = (
        judge_machines(machines, f"{ray.get_runtime_context().gcs_address}, Ray {ray.__version__}"),
        judge_authentication(machines),
        judge_versions(machines, own),
        *judge_measured(measured),
        *judge_links(measured),
    )
    return ClusterDiagnosis(address=address, machines=machines, measured=measured, findings=findings)


def judge_machines(machines: Sequence[MachineFacts], place: str) -> Finding:
    """How many there are, and what they have together."""
    free = sum(machine.free_bytes for machine in machines)
    hosts = len({machine.kernel for machine in machines})
    shared = "" if hosts == len(machines) else f", on {hosts} kernel{'s' if hosts > 1 else ''}"
    count = f"{len(machines)} machine{'s' if len(machines) > 1 else ''}"
    value = f"{count} at {place}{shared}, {format_bytes(free)} free in all"
    outside = [machine.name for machine in machines if not machine.node_id]
    numbers: dict[str, Number] = {"machines": len(machines), "free_bytes": free, "outside": outside}
    advice = (
        f"{outside[0]} is outside of it, and all it sends goes through the head: faster on a machine of it" if outside else ""
    )
    return Finding(name="cluster", status="info" if outside else "ok", value=value, numbers=numbers, advice=advice)


def judge_authentication(machines: Sequence[MachineFacts]) -> Finding:
    """Whether Ray asks for a token, on every machine."""
    without = [machine.name for machine in machines if machine.node_id and not machine.authentication]
    name, numbers = "authentication", {"without": without}
    if not without:
        return Finding(name=name, status="ok", value="every machine asks for the cluster's token", numbers=numbers)
    return Finding(
        name=name,
        status="warn",
        value=f"{', '.join(without)} without: anyone who reaches the cluster can run any code on its machines",
        numbers=numbers,
        advice="use it on a trusted network only, or start all nodes again with RAY_AUTH_MODE=token and one token",
    )


def judge_versions(machines: Sequence[MachineFacts], own: dict[str, str]) -> Finding:
    """Whether all have the driver's."""
    numbers: dict[str, Number] = dict(own)
    different = version_differences(machines, own)
    if not different:
        value = f"the same on all: {', '.join(f'{name} {version}' for name, version in own.items())}"
        return Finding(name="versions", status="ok", value=value, numbers=numbers)
    advice = "install the driver's versions there: a model runs on no machine that has others"
    return Finding(name="versions", status="fail", value="; ".join(different), numbers=numbers, advice=advice)


def judge_measured(measured: Sequence[MeasuredMachine]) -> Iterator[Finding]:
    """Memory, disk and products of each machine, and what is slow about it."""
    disks = [machine.rates.disk_rate for machine in measured]
    products = [machine.rates.compute_rate for machine in measured]
    for machine in measured:
        problems = [
            *_memory_problem(machine),
            *_disk_problem(machine, disks),
            *_far_below("its products are", machine.rates.compute_rate, products, "see what else runs there"),
        ]
        facts, rates = machine.facts, machine.rates
        disk = f"disk {format_rate(rates.disk_rate, 1)}" if rates.disk_rate else f"disk not measured: {rates.disk_problem}"
        driver = ", the driver's" if facts.is_driver else ""
        cores = f"{facts.cores} core{'s' if facts.cores > 1 else ''}"
        yield Finding(
            name=facts.name,
            status="warn" if problems else "ok",
            value=f"{facts.host}{driver}: {cores}, {format_bytes(facts.free_bytes)} free, {disk}, "
            f"products with one token read {format_rate(rates.compute_rate, 1)}",
            numbers={
                "cores": facts.cores,
                "free_bytes": facts.free_bytes,
                "disk_rate": rates.disk_rate,
                "compute_rate": rates.compute_rate,
                "folder": rates.folder,
            },
            advice="; ".join(problems),
        )


def judge_links(measured: Sequence[MeasuredMachine]) -> Iterator[Finding]:
    """The link of each machine to the driver."""
    for machine in measured:
        link = machine.link
        if link is None:
            continue
        problems = [*_link_problems(link)]
        yield Finding(
            name=f"link {machine.facts.name}",
            status="warn" if problems else "ok",
            value=str(link),
            numbers={"round_trip_s": link.round_trip_s, "rate": link.rate},
            advice="; ".join(problems),
        )


def _memory_problem(machine: MeasuredMachine) -> Iterator[str]:
    if machine.facts.free_bytes < _LITTLE_MEMORY_BYTES:
        yield "little memory is free: close what uses it, or raise the limit of its container"


def _disk_problem(machine: MeasuredMachine, disks: Sequence[float]) -> Iterator[str]:
    rate = machine.rates.disk_rate
    if not rate:
        yield "it cannot stream: pass --folder with a path on its disk for weights that has room for a scratch file"
    elif rate < SLOW_DISK:
        yield "its disk is slow: what does not fit its memory costs a second for each gigabyte or more"
    else:
        yield from _far_below("its disk is", rate, disks, "it gets fewer layers that stream")


def _far_below(what: str, rate: float, all_rates: Sequence[float], advice: str) -> Iterator[str]:
    usual = statistics.median(all_rates)
    if rate < _FAR_BELOW * usual:
        yield f"{what} far slower than the others' ({format_rate(usual, 1)}): {advice}"


def _link_problems(link: MachineLink) -> Iterator[str]:
    if link.rate < _SLOW_LINK:
        yield "slower than 1 Gbit/s: see its cable, the switch, or whether it is on a wireless network"
    if link.round_trip_s > _SLOW_ROUND_TRIP_S:
        yield "slow to answer: each token waits for it at each of its stages"
