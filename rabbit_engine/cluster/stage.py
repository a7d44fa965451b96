"""A stage on another machine. If its worker ends, another takes its place, and is brought to the same state."""

from __future__ import annotations

import itertools
import logging
import pickle
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from rabbit_engine.cluster.kept_adapters import KeptAdapters
from rabbit_engine.cluster.paces import StagePaces
from rabbit_engine.cluster.request_log import RequestLog
from rabbit_engine.cluster.worker import MOST_REQUESTS, WorkerEndedError, WorkerHandle
from rabbit_engine.errors import ModelClosedError, StageLostError, first_line
from rabbit_engine.streaming import StageAnswer, StageRequest
from rabbit_engine.streaming.stages.stage import CallsInParts, Change, TextOfRequest
from rabbit_engine.utils.spans import format_layers

logger = logging.getLogger(__name__)

_MOST_TRIES = 20
"""Workers that may end during one request."""


class PlacesWorkers(Protocol):
    """Starts workers where memory is, and knows the machines that are gone."""

    def start(self, layers: tuple[int, ...]) -> WorkerHandle:
        """A worker that has opened the stage of these layers, on the machine planned for it, or another if that is gone.
        Raises StageLostError if none has the memory."""
        ...


class ClusterStage:
    """The layers `layers`, in one range or several, on a worker that `places` starts."""

    def __init__(
        self, layers: Iterable[int], places: PlacesWorkers, log: RequestLog, paces: StagePaces, planned_s: float
    ) -> None:
        """`paces` are those of all stages of the model; a pass of this one should take `planned_s`, if that is known."""
        self.layers = tuple(sorted(layers))
        self._shortest = _shortest_range(self.layers)
        self._places, self._log, self._paces, self._planned_s = places, log, paces, planned_s
        self._lock = threading.Lock()
        self._worker = places.start(self.layers)
        self._states: dict[str, str] = {}
        """The worker that has each text's cache."""
        self._adapters = KeptAdapters()
        self._threads = ThreadPoolExecutor(MOST_REQUESTS, thread_name_prefix=f"rabbit-{self.name}")
        self._closed = False

    @property
    def name(self) -> str:
        """The machine."""
        return self._worker.machine

    @property
    def kernels(self) -> str:
        """Those of its worker."""
        return self._worker.opened.kernels

    @property
    def reads(self) -> bool:
        """Whether its worker reads weights in each pass."""
        return self._worker.opened.reads

    @property
    def computes_parts(self) -> bool:
        """Whether its worker has the memory to compute parts of a prompt in one pass."""
        return self._worker.opened.computes_parts

    @property
    def process(self) -> int:
        """The number of the worker's process on its machine."""
        return self._worker.opened.process

    def submit(self, request: StageRequest) -> Future[StageAnswer]:
        """Run the calls on the worker, or on those that follow it."""
        if self._closed:
            raise ModelClosedError(f"the stage on {self.name} is closed")
        if request.text is not None:
            self._adapters.note(request.text.name, request.setting.adapters)
        return self._threads.submit(self._answer, request)

    def fork(self, text: str, changes: tuple[Change, ...], copy: str) -> None:
        """Copy a text's cache. The log of the copy has the same requests, under its own name."""
        payload = pickle.dumps(changes, pickle.HIGHEST_PROTOCOL)
        if changes:
            self._log.add(text, pickle.dumps(StageRequest(None, TextOfRequest(text, changes=changes)), pickle.HIGHEST_PROTOCOL))
        self._log.copy(text, copy)
        self._adapters.copy(text, copy)
        with suppress(WorkerEndedError):  # then both are computed again
            worker = self._worker
            if self._states.get(text) == worker.number:
                worker.fork(text, payload, copy)
                self._states[copy] = worker.number
                return
        self._states.pop(text, None)

    def forget(self, text: str) -> None:
        """Free a text's cache and its log."""
        self._log.forget(text)
        self._adapters.forget(text)
        if self._states.pop(text, None) == self._worker.number and not self._closed:
            self._worker.forget(text)

    def adapt(self, name: str, modules: bytes) -> None:
        """Give the modules of adapters to the worker, and to those that follow it."""
        with self._lock, suppress(WorkerEndedError):  # then the next one gets them
            self._adapters.add(name, modules)
            self._worker.adapt(name, modules)

    def withdraw(self, name: str) -> None:
        """Drop them, once there is no text that was computed with them."""
        with self._lock:
            for unused in self._adapters.withdraw(name):
                self._worker.withdraw(unused)

    def free_bytes(self) -> int:
        """Bytes that caches may take on the machine now; no limit if its worker has ended, which the next request finds."""
        try:
            return self._worker.free_bytes()
        except WorkerEndedError:
            return sys.maxsize

    def tier_bytes(self) -> int:
        """Bytes that caches may take there beside memory; no limit if its worker has ended."""
        try:
            return self._worker.tier_bytes()
        except WorkerEndedError:
            return sys.maxsize

    def close(self) -> None:
        """End the worker. Idempotent."""
        self._closed = True
        self._worker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._log.close()

    def _answer(self, request: StageRequest) -> StageAnswer:
        payload = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
        text, brings_all = (None, False) if request.text is None else (request.text.name, request.text.new is not None)
        start = time.perf_counter()
        for _ in range(_MOST_TRIES):
            worker = self._worker
            try:
                if text is not None and not brings_all and self._states.get(text) != worker.number:
                    self._bring(worker, text)
                answer: StageAnswer = pickle.loads(worker.run(payload))  # noqa: S301 - of our own worker
            except WorkerEndedError as error:
                self._replace(worker, error)
                continue
            except BaseException:
                if text is not None:  # some layers may have added to its cache, others not
                    self._states.pop(text, None)
                raise
            if text is not None:
                if request.alters:
                    self._log.add(text, payload)
                self._states[text] = worker.number
            self._note(request, time.perf_counter() - start)
            return answer
        raise StageLostError(f"{_MOST_TRIES} workers for {self._span} ended one after another: see Ray's logs for why")

    def _bring(self, worker: WorkerHandle, text: str) -> None:
        """Compute a text's cache again on a new worker: the same requests give the same bits."""
        requests = self._log.requests(text)
        if requests is None:
            raise StageLostError(f"the cache of a text was on {worker.machine}, and the disk was too full to keep what made it")
        count = 0
        for request in requests:
            worker.run(_for_text(request, text))
            count += 1
        self._states[text] = worker.number
        logger.info("%s on %s: a text was computed again, in %d passes", self._span, worker.machine, count)

    def _replace(self, ended: WorkerHandle, error: WorkerEndedError) -> None:
        """Start another worker; of several threads that ask, the first does."""
        with self._lock:
            if self._closed:
                raise ModelClosedError(f"the stage on {self.name} is closed") from error
            if self._worker is ended:
                logger.warning("%s; its %s are loaded anew", error, self._span)
                try:
                    ended.close()
                except Exception as failure:  # noqa: BLE001 - whatever Ray raises for a machine that is gone, others take over
                    logger.warning("the worker on %s may still run: %s", ended.machine, first_line(failure))
                self._worker = self._places.start(self.layers)
                self._paces.forget(self.layers)
                with suppress(WorkerEndedError):  # which its first request finds
                    for name, modules in self._adapters.all():
                        self._worker.adapt(name, modules)

    @property
    def _span(self) -> str:
        return format_layers(self.layers)

    def _note(self, request: StageRequest, seconds: float) -> None:
        """Say once if the machine is slow, by its requests for whole ranges in passes of one text: several await each other."""
        calls, texts = len(request.layers), 1 if request.shared is None else request.shared.texts
        if calls < self._shortest or isinstance(request.work, CallsInParts) or texts > 1 or not self._planned_s:
            return
        ratio = seconds * len(self.layers) / (calls * self._planned_s)
        if (reason := self._paces.note(self.layers, ratio)) is not None:
            logger.warning("%s is slow: a pass of its %s takes %s", self.name, self._span, reason)


def _shortest_range(layers: Sequence[int]) -> int:
    """How many layers the shortest of the ranges has."""
    starts = [index for index, layer in enumerate(layers) if not index or layers[index - 1] != layer - 1]
    return min((stop - start for start, stop in itertools.pairwise([*starts, len(layers)])), default=0)


def _for_text(request: bytes, text: str) -> bytes:
    """A request of this text, or of the one that it was copied from, for this one alone."""
    found: StageRequest = pickle.loads(request)  # noqa: S301 - our own
    assert found.text is not None  # noqa: S101 - the log has what texts asked
    return pickle.dumps(replace(found, text=replace(found.text, name=text), shared=None), pickle.HIGHEST_PROTOCOL)
