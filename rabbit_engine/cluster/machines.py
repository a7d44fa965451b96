"""What the machines of a connected cluster are: their addresses, memory and versions. Each tells by one small Ray task."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from packaging.version import InvalidVersion, Version

from rabbit_engine.cluster.connection import require_ray
from rabbit_engine.errors import ClusterError, MachinesDifferError, first_line
from rabbit_engine.utils.sizes import format_bytes

ANSWER_S = 120.0
"""Seconds in which a machine must answer: the first task on it starts a process and imports torch."""

MISSING = "missing"
"""The version of a package that a machine does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """A node of the cluster, as Ray calls a machine. `name` is its address, with the beginning of its `node_id` where several
    nodes have that address.

    `cores` are those that Ray gives away and the process may use, `free_bytes` the memory within the limits of its containers.
    `kernel` is equal on nodes that run on one machine, which has `processors` cores. `authentication` is whether its Ray asks for
    a token, `is_driver` whether this process runs on it. The machine of a process that came by `ray://` is no node: its `node_id`
    is empty.
    """

    name: str
    node_id: str
    address: str
    host: str
    kernel: str
    cores: int
    processors: int
    free_bytes: int
    versions: Mapping[str, str] = field(hash=False)
    authentication: bool
    is_driver: bool

    def __str__(self) -> str:
        driver = ", the driver's" if self.is_driver else ""
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.name} ({self.host}{driver}): {cores}, {format_bytes(self.free_bytes)} free; {packages}"


def gather_facts(timeout_s: float = ANSWER_S) -> tuple[MachineFacts, ...]:
    """The living machines of the connected cluster, the driver's first, the others by address. Uses no CPUs that Ray counts.

    Raises ClusterError, with its name, if one does not answer within `timeout_s`.
    """
    ray = require_ray()
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=_place)
    names = _names(nodes)
    is_node = not ray.util.client.ray.is_connected()
    own = ray.get_runtime_context().get_node_id() if is_node else None
    ask = ray.remote(num_cpus=0, max_retries=1)(_look_around())
    asked = {names[node["NodeID"]]: ask.options(scheduling_strategy=pinned_to(node["NodeID"])).remote() for node in nodes}
    told = answers_of(asked, timeout_s)
    found = [_facts_of(node, names[node["NodeID"]], told[names[node["NodeID"]]], own) for node in nodes]
    return tuple(sorted(found if is_node else [_outside(), *found], key=lambda facts: not facts.is_driver))


def own_versions() -> dict[str, str]:
    """The versions of the packages that must be equal on all machines, in this process."""
    versions: dict[str, str] = _look_around()()["versions"]
    return versions


def require_same_versions(facts: Sequence[MachineFacts], own: Mapping[str, str] | None = None) -> None:
    """Raises MachinesDifferError if a machine has other versions than the driver (`own`, by default those of this process).

    A build of torch for other hardware, such as `+cpu`, is the same version.
    """
    if found := "; ".join(version_differences(facts, own_versions() if own is None else own)):
        raise MachinesDifferError(
            f"machines of the cluster have other versions than the driver: {found}: install the driver's versions on all of them"
        )


def version_differences(facts: Sequence[MachineFacts], own: Mapping[str, str]) -> list[str]:
    """One text for each package of a machine whose version differs from `own`: the machine, the package, both versions."""
    return [
        f"{machine.name} has {package} {theirs}, the driver {mine}"
        for machine in facts
        for package, mine in own.items()
        if _public(theirs := machine.versions.get(package, MISSING)) != _public(mine)
    ]


def pinned_to(node_id: str) -> Any:
    """The scheduling strategy of a task or an actor for that node and no other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def answers_of(asked: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """What the tasks returned, by machine. Raises ClusterError, which names the first machine that failed or took too long."""
    ray = require_ray()
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    told = {}
    for name, answer in asked.items():
        try:
            told[name] = ray.get(answer, timeout=1.0)
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"machine {name} did not answer within {timeout_s:g} s: see `ray status` there, and whether it has memory left"
            ) from error
        except ray.exceptions.RayError as error:
            raise ClusterError(f"machine {name} could not answer: {_cause(error)}") from error
    return told


def _look_around() -> Callable[[], dict[str, Any]]:
    """The task that asks a machine. It travels as source of its own, not by name: the package there may be another version."""

    def look_around() -> dict[str, Any]:
        import importlib
        import importlib.metadata
        import os
        import platform
        import socket
        from pathlib import Path

        versions = {"python": platform.python_version()}
        try:
            versions["rabbit_engine"] = importlib.import_module("rabbit_engine").__version__  # that machine's, not this row's
        except ImportError:
            versions["rabbit_engine"] = "missing"
        for package in ("torch", "transformers", "safetensors"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "missing"
        try:
            import torch

            from rabbit_engine.utils.platform import free_memory_bytes

            free = free_memory_bytes(torch.device("cpu"))
        except ImportError:
            free = 0
        boot = Path("/proc/sys/kernel/random/boot_id")
        host = socket.gethostname()
        return {
            "versions": versions,
            "free_bytes": free,
            "host": host,
            "kernel": boot.read_text().strip() if boot.exists() else host,
            "processors": os.cpu_count() or 1,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "authentication": os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
        }

    return look_around


def _facts_of(node: Mapping[str, Any], name: str, told: Mapping[str, Any], own: str | None) -> MachineFacts:
    given = max(1, int(node["Resources"].get("CPU", 1)))
    return MachineFacts(
        name=name,
        node_id=node["NodeID"],
        address=node["NodeManagerAddress"],
        is_driver=node["NodeID"] == own,
        **{**told, "cores": min(given, told["cores"])},
    )


def _outside() -> MachineFacts:
    """This process's machine, which is no node."""
    told = _look_around()()
    return MachineFacts(name=told["host"], node_id="", address="", is_driver=True, **told)


def _names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By node id: its address, made different where it is not."""
    addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in nodes}
    counts = Counter(addresses.values())
    return {node: address if counts[address] == 1 else f"{address}/{node[:6]}" for node, address in addresses.items()}


def _place(node: Mapping[str, Any]) -> tuple[bytes, str]:
    """Addresses in the order of their numbers."""
    address = node["NodeManagerAddress"]
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address), node["NodeID"]
    except OSError:
        return str(address).encode(), node["NodeID"]


def _public(version: str) -> str:
    """A version without its build."""
    try:
        return Version(version).public
    except InvalidVersion:
        return version


def _cause(error: Exception) -> str:
    """The first line of what a task raised on the other machine."""
    return first_line(getattr(error, "cause", None) or error)
