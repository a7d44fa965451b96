"""The thread that runs a model's generations in step, and its queue."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol
from weakref import WeakSet

import torch

from rabbit_engine.errors import ConfigurationError, QueueFullError, SessionClosedError
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.demand import Demand
from rabbit_engine.quantization.kernels.openmp import release_team
from rabbit_engine.sessions.beginnings import Beginning
from rabbit_engine.sessions.room import Room
from rabbit_engine.sessions.waiting import AnswerLength, passes_until_start
from rabbit_engine.streaming import Fiber, RandomStream, Scheduler, share_products

logger = logging.getLogger(__name__)

_MOST_FORWARDS = 1024
"""Single forwards in a pass: each is a flow of its own, and more of them would not make a pass cheaper."""


class Cancelled(BaseException):
    """The answer is no longer wanted. A BaseException, so that no code in between treats it as an ordinary error."""


@dataclass(slots=True, eq=False)
class Job:
    """`work` runs in the engine's thread. `on_end` is called once, in any thread, with None or the exception that ended it.

    With `exact`, it does not share matrix products with others, whatever the engine does. It may wait for a pass in which others
    compute its `beginning`. If it `continues` the text that ended last, it frees what that left itself.
    """

    work: Callable[[], None]
    on_end: Callable[[BaseException | None], None]
    demand: Demand
    seed: int | None = None
    exact: bool = False
    beginning: Beginning | None = None
    continues: bool = False
    fiber: Fiber | None = field(default=None, repr=False)
    cancelled: bool = False
    passes: int = 0

    @property
    def is_forward(self) -> bool:
        """Whether it is a single forward, which is over after one pass."""
        return self.demand.logits is not None

    @property
    def is_computed(self) -> bool:
        """Whether its prompt is: that takes the first pass."""
        return self.passes > 0

    @property
    def is_awaited(self) -> bool:
        """Whether others wait to copy its beginning, for which its cache stays."""
        return self.beginning is not None and self.beginning.is_awaited

    @property
    def follows(self) -> bool:
        """Whether it waits only for what another one computes in this pass."""
        return self.beginning is not None and self.beginning.follows

    def waits(self) -> bool:
        """Whether it should begin after the next pass."""
        return self.beginning is not None and self.beginning.waits()

    def leave(self) -> None:
        """It will not begin."""
        if self.beginning is not None:
            self.beginning.end()


class HoldsMemory(Protocol):
    """Something in memory beside the texts under way."""

    nbytes: int


class Engine:
    """Serves jobs in order: each starts with the next pass that has room for it, at most `most` at a time.

    One whose beginning others compute in that pass may wait, and those after it start.
    Of single forwards, which end with a pass, there may be as many as memory holds. With `alone`, one job runs at a time.
    Up to `queue` more may wait. With `exact`, each gets the bits it would get alone; otherwise fibers share matrix products.
    `free_last` frees what the text that ended last left, for a job that does not continue it.
    """

    def __init__(
        self,
        model: SessionModel,
        room: Room,
        *,
        most: int,
        queue: int,
        exact: bool = True,
        alone: bool = False,
        free_last: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._room = model, room
        self._most, self._queue, self._alone, self._free_last = most, queue, alone, free_last
        runtime = runtime_of(model)
        self._transfer, binding = runtime.transfer, runtime.binding
        self._scheduler = Scheduler(binding, shares=not exact)
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._kept: list[Job] = []
        self._held: WeakSet[HoldsMemory] = WeakSet()
        self._length = AnswerLength()
        self._changed = threading.Condition()
        self._closed = False
        release_team()  # of the thread that loaded the model: this one's would wait more slowly
        self._thread = threading.Thread(target=self._serve, name="rabbit-session", daemon=True)
        self._unshare: Callable[[], None] = _leave if exact else share_products(model, binding)
        try:
            self._thread.start()
        except BaseException:
            self._unshare()
            raise

    @property
    def forked(self) -> bool:
        """Whether this process was forked after the model was loaded: its thread is gone, and locks may stay held."""
        return self._transfer.forked

    def require_process(self) -> None:
        """Raise ModelClosedError in a forked child."""
        self._transfer.require_process()

    def require_other_thread(self) -> None:
        """Raise ConfigurationError in the thread that serves: it would wait for itself."""
        if threading.current_thread() is self._thread:
            raise ConfigurationError(
                "the session's own thread would wait for itself: call the model there, or the session from another thread"
            )

    def hold(self, held: HoldsMemory) -> None:
        """Count the memory of `held` as long as anyone refers to it."""
        with self._changed:
            self._held.add(held)

    @property
    def held_bytes(self) -> int:
        """Bytes that are held beside the texts under way."""
        with self._changed:
            return sum(held.nbytes for held in self._held)

    @property
    def waiting(self) -> int:
        """The number of jobs that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of jobs under way."""
        return len(self._running)

    def submit(self, jobs: Sequence[Job], *, bounded: bool = True) -> None:
        """Queue all jobs, or none. Jobs that can start at once do not count as waiting.

        Raises QueueFullError if `bounded` and there is no room, SessionClosedError, or ModelClosedError in a forked child.
        """
        self.require_process()
        release_team()
        with self._changed:
            if self._closed:
                raise SessionClosedError("the session is closed: open another")
            if bounded and len(self._waiting) + len(jobs) > self._places:
                self.refuse()
            self._waiting.extend(jobs)
            self._changed.notify_all()

    @property
    def _places(self) -> int:
        return self._queue + max(0, self._most - sum(not job.is_forward for job in self._running))

    @property
    def is_full(self) -> bool:
        """Whether one more job would be rejected."""
        return len(self._waiting) >= self._places

    def refuse(self) -> NoReturn:
        """Raise QueueFullError."""
        retry = self._seconds_to_a_place()
        raise QueueFullError(
            f"the queue is full: {len(self._running)} under way, {len(self._waiting)} waiting, the last of them for about "
            f"{math.ceil(self.start_s)} s; try again in {math.ceil(retry)} s, or let more wait (max_queue)",
            retry,
        )

    def place(self, job: Job) -> int | None:
        """Its place among those that wait, 1 for the next one; None once it has started."""
        with self._changed:
            return self._waiting.index(job) + 1 if job in self._waiting else None

    @property
    def start_s(self) -> float:
        """Estimated seconds until one more request would start: with the next pass, or when enough answers have ended."""
        return self._pass_left_s() + self._pass_s * self._passes_until_start()

    def cancel(self, job: Job) -> None:
        """End the job at the next unit it waits for, or before it starts. Does nothing in a forked child."""
        if self.forked:
            return
        with self._changed:
            job.cancelled = True
            waited = job in self._waiting
            if waited:
                self._waiting.remove(job)
                job.leave()
            elif job.fiber is not None:
                job.fiber.stop(Cancelled())
            self._changed.notify_all()
        if waited:
            _tell(job, Cancelled())

    def close(self) -> None:
        """Cancel everything, end the thread and restore the model. Idempotent; returns at once in a forked child."""
        if self.forked:
            return
        with self._changed:
            self._closed = True
            for job in self._running:
                if job.fiber is not None:
                    job.fiber.stop(SessionClosedError("the session was closed before the answer was complete"))
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _seconds_to_a_place(self) -> float:
        return max(1.0, self._pass_s * min(map(self._passes_left, tuple(self._running)), default=1.0))

    def _passes_until_start(self) -> float:
        with self._changed:
            running, queued = list(self._running), list(self._waiting)
        most = 1 if self._alone else self._most
        following = [job for job in queued if job.follows][: max(0, most - len(running))]
        running, waiting = running + following, [job for job in queued if job not in following]
        return passes_until_start(list(map(self._passes_left, running)), list(map(self._passes_left, waiting)), most)

    def _passes_left(self, job: Job) -> float:
        return 1.0 if job.is_forward else self._length.left(job.demand.answer, job.passes)

    @property
    def _pass_s(self) -> float:
        profile = self._model.profile
        return profile.pass_s / profile.passes if profile.passes else 1.0

    def _pass_left_s(self) -> float:
        progress = self._model.progress
        return 0.0 if progress is None else progress.remaining_s or 0.0

    def _serve(self) -> None:
        torch.set_grad_enabled(False)  # for all fibers: they share the thread's switch
        try:
            while self._wait_for_work():
                self._admit()
                self._run_pass()
        finally:
            self._end_all()
            self._unshare()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._closed or self._waiting or self._scheduler.fibers):
                self._changed.wait()
            return not self._closed

    def _end_all(self) -> None:
        with self._changed:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
        for job in waiting:
            job.leave()
        self._scheduler.stop(SessionClosedError("the session was closed before the answer was complete"))
        self._settle()
        for job in waiting:
            _tell(job, SessionClosedError("the session was closed before the answer began"))

    def _admit(self) -> None:
        """Start jobs in order while memory has room for them and for those under way, except those that wait for others."""
        used = self.held_bytes + self._need(self._running)
        with self._changed:
            queued = tuple(self._waiting)
        for job in queued:
            need = self._room.need([job.demand])
            if self._is_full_for(job) or (self._running and used + need > self._room.nbytes):
                break
            if used + need + self._need(self._kept) > self._room.nbytes:
                self._give_up_kept()
            if self._take(job):
                used += need
                self._start(job)
        self._kept = [job for job in self._kept if job.is_awaited]

    def _need(self, jobs: Sequence[Job]) -> int:
        """Bytes of jobs that have started."""
        return self._room.need(replace(job.demand, is_computed=job.is_computed) for job in jobs)

    def _give_up_kept(self) -> None:
        """Free the memory of jobs that have ended, for which others wait: these compute their beginnings themselves."""
        for job in self._kept:
            if job.beginning is not None:
                job.beginning.give_up()
        self._kept = []

    def _take(self, job: Job) -> bool:
        """Take it out of the queue; False if it waits for another one's beginning, or is not wanted any more."""
        with self._changed:
            if self._closed or job.cancelled or (self._running and job.waits()):
                return False
            self._waiting.remove(job)
            self._running.append(job)
            return True

    def _start(self, job: Job) -> None:
        if not job.continues:
            self._free_last()
        random_stream = RandomStream(job.seed, self._model.device) if job.seed is not None else None
        job.fiber = self._scheduler.add(job.work, random_stream, exact=job.exact)
        if job.cancelled:
            job.fiber.stop(Cancelled())

    def _is_full_for(self, job: Job) -> bool:
        if self._alone:
            return bool(self._running)
        of_its_kind = sum(other.is_forward == job.is_forward for other in self._running)
        return of_its_kind >= (_MOST_FORWARDS if job.is_forward else self._most)

    def _run_pass(self) -> None:
        if self._scheduler.fibers:
            try:
                self._scheduler.run_pass()
            except Exception as error:  # noqa: BLE001 - a failure of the pass itself, such as a closed model, ends every answer
                self._scheduler.stop(error)
        for job in self._running:
            job.passes += 1
        self._settle()

    def _settle(self) -> None:
        """Report finished jobs."""
        done = [job for job in self._running if job.fiber is not None and job.fiber.dead]
        with self._changed:
            self._running = [job for job in self._running if job not in done]
        self._kept += [job for job in done if job.is_awaited]
        for job in done:
            if job.demand.answer and not job.cancelled:
                self._length.add(job.passes)
            _tell(job, job.fiber.failure)  # type: ignore[union-attr]


def _leave() -> None:
    """Do nothing: no passes were shared."""


def _tell(job: Job, failure: BaseException | None) -> None:
    """Report the end. An error in one callback must not affect the other jobs."""
    try:
        job.on_end(failure)
    except Exception:
        logger.exception("the callback at the end of an answer failed")
