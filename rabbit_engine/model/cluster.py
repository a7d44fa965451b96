"""A model over the machines of a Ray cluster: which layers each has, and how it loads them."""

from __future__ import annotations

import functools
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from rabbit_engine.checkpoints import Streamable
from rabbit_engine.cluster import connect, require_ray
from rabbit_engine.cluster.description import Area
from rabbit_engine.cluster.files import FileExtent, FilesDescription, chunks_from, describe, ensure, extents_of, serve_files
from rabbit_engine.cluster.machines import MachineFacts, gather_facts, require_same_versions
from rabbit_engine.cluster.measure import measure_machines
from rabbit_engine.cluster.paces import StagePaces
from rabbit_engine.cluster.request_log import RequestLog
from rabbit_engine.cluster.stage import ClusterStage
from rabbit_engine.cluster.worker import StageFactory, WorkerEndedError, WorkerHandle
from rabbit_engine.config import StreamConfig
from rabbit_engine.errors import BudgetError, ClusterError, ConfigurationError, StageLostError, first_line
from rabbit_engine.model.settings import LoadSettings
from rabbit_engine.model.stages import LocalStage, Opened, load_in_stages
from rabbit_engine.planning.budget import staging_bytes
from rabbit_engine.planning.forecast import partition_of
from rabbit_engine.planning.machines import Machine
from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.stages import MOST_ROUNDS, StagesPlan, crowd, layered_units, plan_stages, take_over
from rabbit_engine.planning.stages_plan import HeldStages
from rabbit_engine.planning.texts import texts_folder
from rabbit_engine.utils.platform import free_memory_bytes
from rabbit_engine.utils.spans import format_layers

logger = logging.getLogger(__name__)

WORKER_BYTES = 600_000_000
"""Memory of a worker's process besides the model: Python, torch and transformers."""
_KEPT_FREE = 0.1
_MOST_FAILURES = 3
"""Workers that may end while they load on a machine that is alive."""
_USUAL_TOKENS = 1024
"""Tokens of texts that each machine keeps room for, if `max_seq_len` names no number."""


def load_on_cluster(name: str | Path, settings: LoadSettings, address: str) -> Any:
    """Load a model whose layers are divided among the machines of the cluster at `address`; this one is the first of them.

    Raises what loading raises, ClusterError, and MachinesDifferError before anything is read.
    """
    _require_one_cpu(settings)
    return load_in_stages(name, settings, functools.partial(_open, facts=_connected(address), settings=settings))


def forecast_on_cluster(name: str | Path, settings: LoadSettings, address: str, texts: int = 1) -> StagesPlan:
    """The stages that `load_on_cluster` would make now, for a pass of `texts`. Reads headers, and measures the machines.

    Raises what loading would raise before it reads a weight.
    """
    _require_one_cpu(settings)
    facts = _connected(address)
    partition, _ = partition_of(name, settings.source, settings.split, settings.stream)
    return plan_on(partition, machines_of(facts, settings.stream), settings.stream, texts)


def _require_one_cpu(settings: LoadSettings) -> None:
    device = settings.stream.device
    if device.type != "cpu":
        raise ConfigurationError(
            f'the machines of a cluster compute on CPUs, not on {device}: give device="cpu", or leave out cluster='
        )
    if settings.row is not None:
        names = ", ".join(one.name for one in settings.row.devices)
        raise ConfigurationError(
            f"a cluster divides the layers among its machines, not among {names}: leave out device_map, and give one size for "
            'each machine, as max_memory={"cpu": "8GiB"}'
        )


def _connected(address: str) -> tuple[MachineFacts, ...]:
    """The machines of the cluster, which have the driver's versions."""
    connect(address)
    facts = gather_facts()
    require_same_versions(facts)
    return facts


def plan_on(partition: Partition, machines: Sequence[Machine], stream: StreamConfig, texts: int = 1) -> StagesPlan:
    """The stages of a model on these machines, the driver first, each with memory for the buffers that reads go through besides.
    Raises BudgetError."""
    staging = staging_bytes(partition, stream.device)
    machines = [replace(one, memory_bytes=max(0, one.memory_bytes - staging)) for one in machines]
    units = layered_units(partition, cached_tokens=stream.max_seq_len or _USUAL_TOKENS)
    return plan_stages(units, machines, texts=texts, most_rounds=MOST_ROUNDS)


def machines_of(facts: Sequence[MachineFacts], stream: StreamConfig) -> list[Machine]:
    """The machines as the planner takes them, measured, with the memory that the model may have on each."""
    measured = measure_machines(facts)
    for one in measured:
        logger.info("%s", one)
    return [one.as_planned(_memory_for_model(one.facts, stream)) for one in measured]


def _memory_for_model(facts: MachineFacts, stream: StreamConfig) -> int:
    free = free_memory_bytes(torch.device("cpu")) if facts.is_driver else facts.free_bytes - WORKER_BYTES
    room = max(0, int(free * (1 - _KEPT_FREE)))
    return room if stream.device_budget_bytes is None else min(room, stream.device_budget_bytes)


def _open(partition: Partition, checkpoint: Streamable, *, facts: Sequence[MachineFacts], settings: LoadSettings) -> Opened:
    plan = plan_on(partition, machines_of(facts, settings.stream), settings.stream)
    logger.info("stages:\n%s", plan)
    description, staging = describe(checkpoint), staging_bytes(partition, settings.stream.device)
    files = serve_files(description) if facts[0].node_id else None  # a client of the cluster is no machine of it
    names = partition.layout.layers
    places = _Places(
        plan,
        {one.name: one for one in facts},
        functools.partial(_factory, description, checkpoint, names, settings, files, staging),
    )
    log, paces = RequestLog(texts_folder()), StagePaces()
    turns = {stage.first: turn for stage, turn in zip(plan.stages, plan.turns()[:-1], strict=True)}
    there = [one for one in plan.held if one.machine.name != plan.driver.name]
    seconds = [sum(turns[stage.first].seconds for stage in one.stages) for one in there]
    with ThreadPoolExecutor(max(1, len(there))) as pool:
        opening = [
            pool.submit(ClusterStage, one.layers, places, log, paces, own) for one, own in zip(there, seconds, strict=True)
        ]
    stages = [one.result() for one in opening if one.exception() is None]
    for one in opening:
        if (error := one.exception()) is not None:
            for stage in stages:
                stage.close()
            raise error
    return Opened(stages, (plan.ends_plan.budget.weights_bytes or 0) + staging, plan)


def _factory(
    description: FilesDescription,
    checkpoint: Streamable,
    names: Sequence[str],
    settings: LoadSettings,
    files: Any,
    staging: int,
    layers: tuple[int, ...],
    nbytes: int,
) -> StageFactory:
    """What opens the stage of `layers` in `nbytes` of memory and `staging` for reads, in another process."""
    mine = tuple(f"{names[number]}." for number in layers)
    extents = extents_of(checkpoint, [name for name in checkpoint.entries if name.startswith(mine)])
    stream = replace(settings.stream, device_budget_bytes=nbytes + staging, max_seq_len=None)
    settings = replace(settings, source=description.source, split=description.split, stream=stream, speculate=None)  # no token
    return functools.partial(open_there, description, extents, settings, layers, files)


def open_there(
    description: FilesDescription, extents: tuple[FileExtent, ...], settings: LoadSettings, layers: tuple[int, ...], files: Any
) -> LocalStage:
    """Open a stage on the machine that this runs on, whose files are there, or fetched from the driver."""
    found = ensure(description, extents, chunks_from(files) if files is not None else _no_chunks)
    return LocalStage(found.name, replace(settings, source=found.source, split=found.split), layers)


def _no_chunks(area: Area, name: str, offset: int, nbytes: int) -> NoReturn:
    """For `ensure`, where the driver is no machine of the cluster."""
    del area, offset, nbytes
    raise ClusterError(
        f"{socket.gethostname()} has no {name}, and a driver that is connected by ray:// sends no files: put the model where the "
        "driver has it, or load it from a machine of the cluster"
    )


class _Places:
    """Where the stages of a plan are, and where they go if a machine ends: see `cluster.stage.PlacesWorkers`. Thread-safe.

    A worker has what was placed together: a machine's ranges of layers, or those that it took over.
    """

    def __init__(
        self, plan: StagesPlan, facts: Mapping[str, MachineFacts], factory: Callable[[tuple[int, ...], int], StageFactory]
    ) -> None:
        self.plan = plan
        self._facts, self._factory = facts, factory
        self._lock = threading.Lock()
        self._workers: dict[tuple[int, ...], WorkerHandle] = {}

    def start(self, layers: tuple[int, ...]) -> WorkerHandle:
        """A worker that has opened the stage of `layers`."""
        failures = 0
        while True:
            with self._lock:
                self._leave_the_dead()
                held = next(one for one in self.plan.held if one.layers == layers)
            try:
                return self._start(held)
            except WorkerEndedError as error:
                logger.warning("%s while it loaded %s", error, format_layers(layers))
                failures += self._is_alive(held.machine.name)
                if failures == _MOST_FAILURES:
                    raise StageLostError(
                        f"{failures} workers ended while they loaded {format_layers(layers)} on {held.machine.name}, "
                        "probably for memory: pass a smaller max_memory"
                    ) from error

    def _start(self, held: HeldStages) -> WorkerHandle:
        facts = self._facts[held.machine.name]
        worker = WorkerHandle(held.machine.name, facts.node_id, facts.cores)
        self._workers[held.layers] = worker
        try:
            about = worker.open(self._factory(held.layers, held.plan.budget.weights_bytes or 0))
        except BaseException:
            _end(worker)
            raise
        logger.info("%s: %s", held.machine.name, about)
        return worker

    def _leave_the_dead(self) -> None:
        """Plan without the machines that have ended. Raises StageLostError if no other has the memory."""
        for machine in self.plan.machines[1:]:
            if self._is_alive(machine.name):
                continue
            before = {one.layers: one.plan for one in self.plan.held}
            self.plan = _without(self.plan, machine.name)
            logger.warning("machine %s is gone; its layers go to those that are left:\n%s", machine.name, self.plan)
            for one in self.plan.held:
                if one.plan is not before[one.layers] and one.layers in self._workers:
                    _end(self._workers[one.layers])  # it opens again, in the memory that it has now

    def _is_alive(self, name: str) -> bool:
        nodes = require_ray().nodes()
        return any(node["NodeID"] == self._facts[name].node_id and node["Alive"] for node in nodes)


def _without(plan: StagesPlan, lost: str) -> StagesPlan:
    """The plan without a machine: its stages go where memory is left, or else where the others then hold less."""
    try:
        with suppress(BudgetError):
            return take_over(plan, lost)
        return crowd(plan, lost)
    except BudgetError as error:
        raise StageLostError(f"machine {lost} is gone: {error}") from error


def _end(worker: WorkerHandle) -> None:
    try:
        worker.close()
    except Exception as error:  # noqa: BLE001 - whatever Ray raises for a machine that is gone, the others go on
        logger.warning("the worker on %s may still run: %s", worker.machine, first_line(error))
