"""Runs cases in forked processes with limits of time and memory: one that hangs or dies is a finding, and the rest continues."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import psutil

from fuzzing.judge import Answer, Case, Verdict, be_quiet

CASE_S = 10.0
"""A case that takes longer hangs."""

CASE_BYTES = 3 * 2**30
"""The memory a case may allocate beyond the process's own."""

_fork = multiprocessing.get_context("fork")


@dataclass(slots=True)
class _Worker:
    process: ForkProcess
    pipe: Connection
    index: int = -1
    started: float = 0.0


def run_cases(
    root: Path, seed: int, indices: Sequence[int], answers: dict[str, Answer], workers: int
) -> Iterator[tuple[int, Verdict]]:
    """Judge each case; (index, verdict) in order of completion."""
    todo, busy = iter(indices), [_start(root, seed, answers) for _ in range(min(workers, len(indices)))]
    try:
        for worker in busy:
            _give(worker, next(todo))
        while busy:
            ended = wait([worker.pipe for worker in busy], timeout=0.5)
            for worker in list(busy):
                verdict = _verdict(worker, ended=worker.pipe in ended)
                if verdict is None:
                    continue
                yield worker.index, verdict
                index = next(todo, None)
                if index is None or not worker.process.is_alive():
                    _stop(worker)
                    busy.remove(worker)
                if index is not None:
                    if worker not in busy:
                        busy.append(worker := _start(root, seed, answers))
                    _give(worker, index)
    finally:
        for worker in busy:
            _stop(worker)


def _give(worker: _Worker, index: int) -> None:
    worker.index, worker.started = index, time.monotonic()
    worker.pipe.send(index)


def _verdict(worker: _Worker, *, ended: bool) -> Verdict | None:
    """The worker's verdict, or one for its silence."""
    if ended:
        try:
            return worker.pipe.recv()  # type: ignore[no-any-return]
        except EOFError:
            worker.process.join()
            return Verdict("died", "?", "?", f"exit code {worker.process.exitcode}")
    if time.monotonic() - worker.started < CASE_S:
        return None
    worker.process.kill()
    worker.process.join()
    return Verdict("hang", "?", "?", f"longer than {CASE_S:.0f} s")


def _start(root: Path, seed: int, answers: dict[str, Answer]) -> _Worker:
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=_work, args=(theirs, root, seed, answers), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _stop(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.join(2)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _work(pipe: Connection, root: Path, seed: int, answers: dict[str, Answer]) -> None:
    be_quiet()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # bars that cannot be switched off
    limit = psutil.Process().memory_info().vms + CASE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(Case(root, seed, pipe.recv(), answers).judge())
