"""The process on a machine that has a stage of a model: a Ray actor, which answers requests and says which incarnation it is."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rabbit_engine.cluster.connection import require_ray
from rabbit_engine.cluster.machines import pinned_to
from rabbit_engine.errors import ClusterError, RabbitError, first_line
from rabbit_engine.streaming import OpenStage

StageFactory = Callable[[], OpenStage]
"""Opens the stage in the process that it is sent to."""

MOST_REQUESTS = 256
"""Requests under way in one worker: more wait in Ray."""


@dataclass(frozen=True, slots=True)
class OpenedThere:
    """The number of a worker's process, what its stage is (see `OpenStage`), and a line about that."""

    process: int
    kernels: str
    reads: bool
    computes_parts: bool
    about: str


class StageWorker:
    """What runs in the actor. Requests and answers are pickled by the caller, who keeps the bytes of a request."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)  # Ray sets one
        self._stage: OpenStage | None = None

    def open(self, factory: StageFactory) -> OpenedThere:
        """Open the stage."""
        stage = self._stage = factory()
        return OpenedThere(os.getpid(), stage.kernels, stage.reads, stage.computes_parts, repr(stage))

    def run(self, request: bytes) -> bytes:
        """Answer a `StageRequest`. Several run at once."""
        answer = self._opened.submit(pickle.loads(request)).result()  # noqa: S301 - of the driver, which Ray has authenticated
        return pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)

    def fork(self, text: str, changes: bytes, copy: str) -> None:
        """Copy the cache of a text after the changes."""
        self._opened.fork(text, pickle.loads(changes), copy)  # noqa: S301

    def free_bytes(self) -> int:
        """Bytes that caches may take."""
        return self._opened.free_bytes()

    def tier_bytes(self) -> int:
        """Bytes that caches may take beside memory."""
        return self._opened.tier_bytes()

    def forget(self, text: str) -> None:
        """Free the cache of a text."""
        self._opened.forget(text)

    def adapt(self, name: str, modules: bytes) -> None:
        """Have the modules of adapters."""
        self._opened.adapt(name, modules)

    def withdraw(self, name: str) -> None:
        """Drop the modules of adapters."""
        self._opened.withdraw(name)

    @property
    def _opened(self) -> OpenStage:
        if self._stage is None:
            raise ClusterError("this worker has not opened its stage")
        return self._stage


class WorkerEndedError(Exception):
    """The worker is gone, or cannot be reached: what it had is lost."""


class WorkerHandle:
    """The driver's side of a worker on the node `node_id`. Ends with `close`, or with this process."""

    def __init__(self, machine: str, node_id: str, cores: int) -> None:
        self.machine = machine
        self.number = uuid.uuid4().hex
        self.opened = OpenedThere(0, "", reads=True, computes_parts=False, about="")
        """What it is, once it has opened its stage."""
        ray = self._ray = require_ray()
        actor = ray.remote(num_cpus=0, max_concurrency=MOST_REQUESTS, max_restarts=0, max_task_retries=0)(StageWorker)
        self._actor = actor.options(scheduling_strategy=pinned_to(node_id)).remote(cores)

    def open(self, factory: StageFactory) -> str:
        """Open the stage there; a line about it. Raises what opening raises."""
        self.opened = self._get(self._actor.open.remote(factory))
        return self.opened.about

    def run(self, request: bytes) -> bytes:
        """The answer. Raises what the layers raise, WorkerEndedError if the worker ended."""
        answer: bytes = self._get(self._actor.run.remote(request))
        return answer

    def fork(self, text: str, changes: bytes, copy: str) -> None:
        """Copy a text's cache."""
        self._get(self._actor.fork.remote(text, changes, copy))

    def free_bytes(self) -> int:
        """Bytes that caches may take there."""
        return int(self._get(self._actor.free_bytes.remote()))

    def tier_bytes(self) -> int:
        """Bytes that caches may take there beside memory."""
        return int(self._get(self._actor.tier_bytes.remote()))

    def forget(self, text: str) -> None:
        """Free a text's cache. Does not wait."""
        if self._ray.is_initialized():
            self._actor.forget.remote(text)

    def adapt(self, name: str, modules: bytes) -> None:
        """Give it the modules of adapters. Raises MissingExtraError, WorkerEndedError."""
        self._get(self._actor.adapt.remote(name, modules))

    def withdraw(self, name: str) -> None:
        """Have it drop them. Does not wait."""
        if self._ray.is_initialized():
            self._actor.withdraw.remote(name)

    def close(self) -> None:
        """End the process."""
        if self._ray.is_initialized():
            self._ray.kill(self._actor)

    def _get(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, RabbitError):
                raise cause from error
            raise
        except (errors.RayActorError, errors.ObjectLostError, errors.NodeDiedError) as error:
            raise WorkerEndedError(f"the worker on {self.machine} ended: {first_line(error)}") from error
