"""The actor that runs Ray Data: on the cluster, since a client of it cannot."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rabbit_engine.batches.cluster.blocks import read_table, table_of_lines
from rabbit_engine.batches.cluster.crew import Crew
from rabbit_engine.batches.cluster.order import Failure, LineAnswer, Order
from rabbit_engine.batches.cluster.worker import LineWorker
from rabbit_engine.batches.inputs import InputLine
from rabbit_engine.cluster import require_ray
from rabbit_engine.errors import first_line

if TYPE_CHECKING:
    import pyarrow as pa

_WAITING = 16
"""Blocks of answers that wait for the driver."""


class Shares(NamedTuple):
    """How lines are handed out: in blocks of `lines`, up to `blocks` of them to a worker at once."""

    lines: int
    blocks: int


class TakenAnswers(NamedTuple):
    """What a driver takes: rows, the lines under way, whether it was the last, and why the pipeline ended before."""

    rows: list[LineAnswer | Failure]
    running: int
    ended: bool
    lost: str | None


class AnswerPipeline:
    """Hands blocks of lines to workers by Ray Data, and keeps their answers for the driver, in the order in which they end.

    A worker that dies is started again by Ray, and its blocks are answered again: those of it that ended are not.
    """

    def __init__(self) -> None:
        self._blocks: list[Any] = []
        self._begun: Counter[int] = Counter()
        self._running: dict[int, int] = {}
        self._lock = threading.Lock()
        self._answers: queue.Queue[pa.Table | BaseException | None] = queue.Queue(_WAITING)

    def give(self, lines: Sequence[InputLine]) -> None:
        """Add a block."""
        self._blocks.append(require_ray().put(table_of_lines(lines)))

    def begin(self, first: int, count: int) -> int:
        """Called by a worker as it begins the block whose first line is `first`: how often it was begun."""
        with self._lock:
            self._begun[first] += 1
            self._running[first] = count
            return self._begun[first]

    def start(self, order: Order, crew: Crew, group: Any, shares: Shares) -> None:
        """Start the workers, in the placement group, on the blocks that were given."""
        own = require_ray().get_runtime_context().current_actor
        threading.Thread(target=self._run, args=(order, crew, group, shares, own), daemon=True).start()

    def take(self, timeout_s: float) -> TakenAnswers:
        """The next block of answers, and all that have ended; none if none ends within `timeout_s`."""
        rows: list[LineAnswer | Failure] = []
        ended, lost = False, None
        for found in self._found(timeout_s):
            if found is None:
                ended = True
            elif isinstance(found, BaseException):
                lost = f"{type(found).__name__}: {first_line(found)}"
            else:
                rows += read_table(found)
        return TakenAnswers(rows, self._still_running(rows), ended, lost)

    def _still_running(self, rows: Sequence[LineAnswer | Failure]) -> int:
        with self._lock:
            for row in rows:
                if isinstance(row, LineAnswer):
                    self._running.pop(row.number, None)
            return sum(self._running.values())

    def _found(self, timeout_s: float) -> Iterator[pa.Table | BaseException | None]:
        try:
            yield self._answers.get(timeout=timeout_s)
            while True:
                yield self._answers.get_nowait()
        except queue.Empty:
            return

    def _run(self, order: Order, crew: Crew, group: Any, shares: Shares, own: Any) -> None:
        try:
            for table in self._tables(order, crew, group, shares, own):
                self._answers.put(table)
            self._answers.put(None)
        except Exception as error:  # noqa: BLE001 - the driver starts another pipeline for the lines that are left
            self._answers.put(error)

    def _tables(self, order: Order, crew: Crew, group: Any, shares: Shares, own: Any) -> Iterator[pa.Table]:
        import ray
        from ray import data
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.scheduling_strategy = PlacementGroupSchedulingStrategy(group)
        lines = data.from_blocks(_Fetched(self._blocks, ray))  # type: ignore[arg-type]
        self._blocks.clear()
        answers = lines.map_batches(
            LineWorker,
            fn_constructor_args=(order, crew.claim, own, crew.files),
            batch_size=shares.lines,
            batch_format="pyarrow",
            num_cpus=crew.claim.cpus,
            num_gpus=crew.claim.gpus or None,
            compute=data.ActorPoolStrategy(
                size=crew.workers,
                max_tasks_in_flight_per_actor=shares.blocks,
                max_concurrent_calls_per_actor=shares.blocks,
                enable_true_multi_threading=True,
            ),
        )
        yield from answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


class _Fetched:
    """Blocks that are in the object store, each fetched when it is its turn."""

    def __init__(self, blocks: Sequence[Any], ray: Any) -> None:
        self._blocks, self._ray = blocks, ray

    def __iter__(self) -> Iterator[Any]:
        return (self._ray.get(block) for block in self._blocks)
