"""A worker: a process on some machine with a model of its own, which answers blocks of lines."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from rabbit_engine.batches.answering import answer, open_session, open_window
from rabbit_engine.batches.cluster.blocks import answer_of, lines_of, table_of
from rabbit_engine.batches.cluster.crew import Claim
from rabbit_engine.batches.cluster.files import located
from rabbit_engine.batches.cluster.order import Failure, LineAnswer, Order
from rabbit_engine.batches.inputs import InputLine
from rabbit_engine.cluster import require_ray
from rabbit_engine.errors import ClusterError
from rabbit_engine.model import AutoModel
from rabbit_engine.model.sent_files import SentFiles
from rabbit_engine.prefixes import open_default

if TYPE_CHECKING:
    import pyarrow as pa

_MOST_ATTEMPTS = 50
"""A block whose worker dies this often ends the batch: one of its lines may be what kills it."""


class LineWorker:
    """Answers blocks of lines, several at once in threads of their own: their texts share the passes of one session.

    Raises nothing, since Ray would only start such a worker again: what goes wrong is a row of its first block.
    """

    def __init__(self, order: Order, claim: Claim, pipeline: Any, files: SentFiles | None = None) -> None:
        self._order, self._pipeline, self._problem = order, pipeline, None
        try:
            order.require_versions()
            _use_cores(claim)
            name, loading = located(order, files)
            with ExitStack() as failed:
                model = AutoModel.from_pretrained(name, **loading)
                failed.callback(model.close)
                store = open_default(order.prefix_bytes, repeated_only=True)
                self._session = open_session(model, order.choices, store)
                failed.pop_all()
        except Exception as error:  # noqa: BLE001 - told with the first block
            self._problem = error

    def __call__(self, block: pa.Table) -> pa.Table:
        """`number` and `raw` of lines -> their answers."""
        try:
            return table_of(self._answers(lines_of(block)))
        except Exception as error:  # noqa: BLE001 - it ends the batch, and the driver says so
            return table_of((), Failure(type(error).__name__, str(error), require_ray().util.get_node_ip_address()))

    def _answers(self, lines: list[InputLine]) -> list[LineAnswer]:
        if self._problem is not None:
            raise self._problem
        self._require_attempts_left(lines)
        window, told, answers = open_window(self._session, self._order.label, self._order.choices), 0, []
        try:
            for answered in answer(window, lines):
                counted = window.tokens  # once: the texts of other lines go on
                answers.append(answer_of(answered, counted - told))
                told = counted
        finally:
            window.cancel()
        return answers

    def _require_attempts_left(self, lines: list[InputLine]) -> None:
        first, last = lines[0].number, lines[-1].number
        attempts = require_ray().get(self._pipeline.begin.remote(first, len(lines)))
        if attempts > _MOST_ATTEMPTS:
            raise ClusterError(
                f"a worker died {attempts - 1} times while it answered lines {first} to {last}: one of them may need more memory "
                "than the machine has; give a smaller max_requests or max_memory, or take it out of the input"
            )


def _use_cores(claim: Claim) -> None:
    """Ray sets torch's threads to the CPUs that a worker claims, which are those of the smallest machine: use all of this one.
    A number of threads that the user has set stays."""
    if os.environ.get("OMP_NUM_THREADS") != str(claim.cpus):
        return
    ray = require_ray()
    own = ray.get_runtime_context().get_node_id()
    cpus = next((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["NodeID"] == own), 0)
    torch.set_num_threads(max(claim.cpus, int(cpus) // claim.on_a_machine))
