"""Which machines of a cluster answer lines, and what of them a worker claims."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from rabbit_engine import errors
from rabbit_engine.batches.cluster.files import ABSENT, own_model
from rabbit_engine.batches.cluster.order import Failure, Order
from rabbit_engine.batches.cluster.probe import probe
from rabbit_engine.errors import ClusterError, ConfigurationError, MachinesDifferError, RabbitError, first_line
from rabbit_engine.model.sent_files import SentFiles, send_files

logger = logging.getLogger(__name__)

_PROBE_S, _PLACE_S = 300.0, 60.0
"""How long machines may take to plan the model, and until their CPUs are free."""

Node = Mapping[str, Any]
"""An entry of `ray.nodes()`."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What of a machine Ray gives to each worker; up to `on_a_machine` workers are on one."""

    cpus: int
    gpus: int
    on_a_machine: int


@dataclass(frozen=True, slots=True)
class Crew:
    """`workers` workers with their claim, on any machine but those whose Ray ids are `without`; `files` are for those that do
    not have the model."""

    workers: int
    claim: Claim
    without: tuple[str, ...]
    files: SentFiles | None = None

    @property
    def label(self) -> dict[str, str]:
        """The machines as Ray's label selector."""
        return {"ray.io/node-id": f"!in({','.join(self.without)})"} if self.without else {}


def find_crew(ray: ModuleType, order: Order, workers: int | None, *, fewer: bool = False) -> Crew:
    """The machines that can run the model by its plan, and the workers on them: one each, unless `workers` says how many.

    A machine that cannot is left out, with a warning. With `fewer`, there is at most one on each machine unless `max_memory` is
    given. Raises what the model raises if no machine can run it, ClusterError for
    a cluster without machines, MachinesDifferError for other files of the model on one, and ConfigurationError for more workers
    than machines without `max_memory`.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    candidates, gpus = _with_device([node for node in alive if node["Resources"].get("CPU", 0) >= 1], order)
    if not candidates:
        raise ClusterError("no machine of the cluster has CPUs for Ray's workers: join some with `ray start --address=...`")
    able, files = _able(ray, order, candidates, gpus)
    count = len(able) if workers is None else workers
    is_shared = count > len(able) and order.loading.get("max_memory") is None
    if is_shared and fewer:
        count = len(able)
    elif is_shared:
        raise ConfigurationError(
            f"workers={count}, and {len(able)} machines can run the model: give max_memory for workers that share a machine"
        )
    each = -(-count // len(able))
    cpus = min(int(node["Resources"]["CPU"]) for node in able) // each
    if not cpus:
        raise ClusterError(f"workers={count} need a CPU each: start fewer")
    ids = {node["NodeID"] for node in able}
    without = tuple(node["NodeID"] for node in alive if node["NodeID"] not in ids)
    return Crew(count, Claim(cpus, gpus, each), without, files)


def place(ray: ModuleType, crew: Crew) -> Any:
    """Ray's placement group for the crew, each worker on a machine of its own if there are enough. Raises ClusterError."""
    bundle = {"CPU": crew.claim.cpus, **({"GPU": crew.claim.gpus} if crew.claim.gpus else {})}
    strategy = "STRICT_SPREAD" if crew.claim.on_a_machine == 1 else "SPREAD"
    selectors = [crew.label] * crew.workers if crew.without else None
    group = ray.util.placement_group([bundle] * crew.workers, strategy, bundle_label_selector=selectors)
    if not group.wait(_PLACE_S):
        ray.util.remove_placement_group(group)
        raise ClusterError(
            f"the cluster has no {crew.workers} workers' {bundle} free after {_PLACE_S:.0f} s: end what runs there, or start "
            "fewer workers"
        )
    return group


def error_of(failure: Failure) -> RabbitError:
    """The error of a machine, of its own class if that is one of ours."""
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, RabbitError):
        return kind(f"{failure.machine}: {failure.message}")
    return ClusterError(f"{failure.machine}: {failure.kind}: {failure.message}")


def _with_device(nodes: Sequence[Node], order: Order) -> tuple[Sequence[Node], int]:
    """The machines that have the kind of device on which all workers compute, and the GPUs that each worker claims."""
    device = order.loading.get("device") or order.loading.get("device_map")
    with_gpu = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1]
    if str(device) == "cpu" or not with_gpu:
        return nodes, 0
    if len(with_gpu) < len(nodes):
        logger.warning('%d machines have no GPU and are left out: give device="cpu" to use all', len(nodes) - len(with_gpu))
    return with_gpu, 1


def _able(ray: ModuleType, order: Order, nodes: Sequence[Node], gpus: int) -> tuple[Sequence[Node], SentFiles | None]:
    """The machines whose plan of the model holds, and the driver's files, if any of them does not have the model. The driver's
    machine alone is not asked: its workers say what they lack."""
    own = own_model(ray, order)
    if len(nodes) == 1 and (own is None or nodes[0]["NodeID"] == ray.get_runtime_context().get_node_id()):
        return nodes, None
    files = None
    if own is None:
        found = _asked(ray, order, nodes, gpus)
    else:
        found = _asked(ray, order.pinned(own.source.repo.commit), nodes, gpus)
        if absent := [node for node, result in found if isinstance(result, Failure) and result.kind in ABSENT]:
            files = send_files(own)
            logger.info("%d machines do not have %s: they fetch it from this one", len(absent), order.model)
            found = [one for one in found if one[0] not in absent] + _asked(ray, order, absent, gpus, files)
    able = [(node, result) for node, result in found if isinstance(result, str)]
    unable = [result for _, result in found if isinstance(result, Failure)]
    if not able:
        raise error_of(unable[0])
    for failure in unable:
        logger.warning("%s is left out: %s", failure.machine, failure.message)
    _require_equal(able)
    return [node for node, _ in able], files


def _asked(
    ray: ModuleType, order: Order, nodes: Sequence[Node], gpus: int, files: SentFiles | None = None
) -> list[tuple[Node, str | Failure]]:
    """What each machine says, with the driver's `files` if it has none."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(max_calls=1, num_cpus=0, num_gpus=gpus)(probe)  # its process ends with it, and frees its memory
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(order, files): node
        for node in nodes
    }
    ready = set(ray.wait(list(asked), num_returns=len(asked), timeout=_PROBE_S)[0])
    return [(node, _result(ray, ref) if ref in ready else _silent(node)) for ref, node in asked.items()]


def _result(ray: ModuleType, ref: Any) -> str | Failure:
    try:
        found: str | Failure = ray.get(ref)
    except ray.exceptions.RayError as error:
        return Failure("ClusterError", first_line(error), "a machine")
    return found


def _silent(node: Node) -> Failure:
    return Failure("ClusterError", f"it did not plan the model within {_PROBE_S:.0f} s", str(node["NodeManagerAddress"]))


def _require_equal(found: Sequence[tuple[Node, str]]) -> None:
    first, digest = found[0]
    other = next((node for node, own in found if own != digest), None)
    if other is not None:
        raise MachinesDifferError(
            f"{other['NodeManagerAddress']} has other files of the model than {first['NodeManagerAddress']}: copy the same ones "
            "to both, or give revision="
        )
