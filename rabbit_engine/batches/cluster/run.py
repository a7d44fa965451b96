"""The driver's side: hands the lines that are left to a pipeline, writes its answers, and starts another if machines are lost."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from rabbit_engine.batches.cluster.crew import Crew, error_of, find_crew, place
from rabbit_engine.batches.cluster.order import Failure, Order, Workers
from rabbit_engine.batches.cluster.pipeline import AnswerPipeline, Shares
from rabbit_engine.batches.inputs import InputLine, Numbered
from rabbit_engine.cluster import connect
from rabbit_engine.cluster.machines import gather_facts, require_same_versions
from rabbit_engine.errors import ClusterError, MachinesDifferError

logger = logging.getLogger(__name__)

_MOST_LINES = 16
"""Lines of a block: its answers are written when the last of them ends, and it is answered again if its worker dies."""
_BLOCKS_EACH = 4
"""So many blocks a worker at least, unless they are of one line: machines that are faster answer more of them."""
_TAKE_S, _LOOK_S, _RETURN_S = 0.5, 5.0, 30.0
"""How long a driver waits for answers, how often it looks for machines that are lost, and how long those may take to return."""
_CALLS = 16
"""Calls of a pipeline that run at once."""
_SETTLE_S = 15.0
"""How long Ray may take to notice that a machine is gone."""
_MOST_BARREN = 5
"""Pipelines in a row that end without an answer."""


class Unanswered(Protocol):
    """The lines of a batch, and its output file."""

    @property
    def left(self) -> int:
        """How many lines have no answer."""

    def lines(self) -> Iterable[InputLine]:
        """Those lines."""

    def write(self, line: Numbered, custom_id: str, response: Mapping[str, object], error: object) -> None:
        """Write the answer of a line, unless it has one."""


def answer_on_cluster(workers: Workers, order: Order, batch: Unanswered, tell: Callable[[int, int], None]) -> None:
    """Answer every line that is left. `tell(running, tokens)` is called as blocks end, and while none does: the lines under
    way, and the tokens generated since the last call.

    Ray starts a worker that dies again. If a machine is lost for good, the lines left go to those that remain. Raises
    MissingExtraError without Ray, ClusterError without a cluster or if no answer comes any more, MachinesDifferError for machines
    with other versions of packages, and as `find_crew` and the model do.
    """
    ray = connect(workers.address)
    barren = 0
    is_first = True
    while before := batch.left:
        try:
            reason = _attempt(ray, order, workers, batch, tell, is_first=is_first)
        except _NoCrewError as error:
            if is_first and error.__cause__ is not None:
                raise error.__cause__ from None
            reason = str(error)
            time.sleep(_SETTLE_S)
        is_first = False
        barren = barren + 1 if batch.left == before else 0
        if barren == _MOST_BARREN:
            raise ClusterError(f"{batch.left} lines are left, and no worker answers: {reason}")
        if batch.left:
            logger.warning("%s: %d lines are handed out again", reason, batch.left)


class _NoCrewError(Exception):
    """The machines cannot start workers now; the cause says why."""


def _attempt(
    ray: ModuleType, order: Order, workers: Workers, batch: Unanswered, tell: Callable[[int, int], None], *, is_first: bool
) -> str:
    """Answer what is left with one pipeline; why it ended."""
    try:
        with _started(ray) as pipeline, _placed(ray, order, workers, is_first=is_first) as (crew, group):
            shares = _shares(batch.left, crew.workers, order.choices.max_requests)
            for block in _blocks(batch.lines(), shares.lines):
                ray.get(pipeline.give.remote(block))
            ray.get(pipeline.start.remote(order, crew, group, shares))
            return _collect(ray, pipeline, _LostMachines(ray, group, shares), batch, tell)
    except ray.exceptions.RayError as error:
        return f"the cluster failed ({type(error).__name__})"


def _collect(ray: ModuleType, pipeline: Any, watch: _LostMachines, batch: Unanswered, tell: Callable[[int, int], None]) -> str:
    while True:
        taken = ray.get(pipeline.take.remote(_TAKE_S))
        for row in taken.rows:
            if isinstance(row, Failure):
                raise error_of(row)
            line = _AnsweredLine(row.number, row.checksum)
            batch.write(line, row.custom_id, json.loads(row.response), None if row.error is None else json.loads(row.error))
        tell(taken.running, sum(row.tokens for row in taken.rows))
        if taken.lost or taken.ended:
            return taken.lost or "the workers ended"
        if (lost := watch.lost(batch.left, answered=bool(taken.rows))) is not None:
            return lost


class _AnsweredLine(NamedTuple):
    """A line that a worker answered."""

    number: int
    checksum: int


class _LostMachines:
    """Notices machines that do not come back, once nothing is left but the lines that they may have."""

    def __init__(self, ray: ModuleType, group: Any, shares: Shares) -> None:
        self._ray, self._group, self._most_lines = ray, group, shares.lines * shares.blocks
        self._looked_s = self._answered_s = time.monotonic()
        self._lost_s: float | None = None

    def lost(self, left: int, *, answered: bool) -> str | None:
        """What to tell when the pipeline can only wait for machines that are gone."""
        now = time.monotonic()
        if answered:
            self._answered_s = now
        if now - self._looked_s > _LOOK_S:
            self._looked_s, missing = now, self._missing()
            self._lost_s = (self._lost_s or now) if missing else None
        if self._lost_s is None or min(now - self._lost_s, now - self._answered_s) < _RETURN_S:
            return None
        missing = self._missing()
        return f"{missing} machines are gone" if missing and left <= missing * self._most_lines else None

    def _missing(self) -> int:
        """How many workers have no machine."""
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        places = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        return sum(place not in alive for place in places.values())


def _shares(lines: int, workers: int, max_requests: int) -> Shares:
    """Blocks small enough that each worker gets several, and as many at once as fill a session."""
    size = max(1, min(_MOST_LINES, max_requests, lines // (_BLOCKS_EACH * workers)))
    return Shares(size, min(-(-max_requests // size), -(-lines // size)))


def _blocks(lines: Iterable[InputLine], size: int) -> Iterator[list[InputLine]]:
    rest = iter(lines)
    return iter(lambda: list(islice(rest, size)), [])


@contextmanager
def _placed(ray: ModuleType, order: Order, workers: Workers, *, is_first: bool) -> Iterator[tuple[Crew, Any]]:
    """A crew and its places, once all machines have the driver's versions: others may not even read the order."""
    try:
        require_same_versions(gather_facts())
        crew = find_crew(ray, order, workers.count, fewer=not is_first)
        group = place(ray, crew)
    except MachinesDifferError:
        raise
    except ClusterError as error:
        raise _NoCrewError(str(error)) from error
    try:
        yield crew, group
    finally:
        ray.util.remove_placement_group(group)


@contextmanager
def _started(ray: ModuleType) -> Iterator[Any]:
    """A pipeline on the driver's machine, which ends with its workers."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    pipeline = ray.remote(AnswerPipeline).options(num_cpus=0, max_concurrency=_CALLS, scheduling_strategy=here).remote()
    try:
        yield pipeline
    finally:
        ray.kill(pipeline)
