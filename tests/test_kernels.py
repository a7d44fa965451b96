"""Kernels on a CPU: every row is computed once, by as many threads as torch may use, and nobody computes after the return."""

from __future__ import annotations

import importlib
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from forking import outcome_in_a_child

from rabbit_engine.quantization import kernels
from rabbit_engine.quantization.kernels.openmp import can_use_team, compute_in_team, release_team
from rabbit_engine.quantization.kernels.pool import compute_in_pool

TEAMS = [compute_in_pool, *([compute_in_team] if can_use_team() else [])]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def count_rows(first: int, stop: int, seen: list[int]) -> None:
    for row in range(first, stop):
        seen[row] += 1


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 1000])
def test_every_row_is_computed_once(count: int, two_threads: None) -> None:
    seen = [0] * count
    kernels.run_rows(count_rows, count, seen)
    assert seen == [1] * count


def test_as_many_threads_compute_as_torch_may_use(two_threads: None) -> None:
    together = threading.Barrier(2, timeout=10)
    threads = set()

    def meet(first: int, stop: int) -> None:
        if first < 2:
            together.wait()
        threads.add(threading.get_ident())

    kernels.run_rows(meet, 8)
    assert len(threads) == 2
    assert threading.get_ident() in threads


@pytest.mark.parametrize("compute_together", TEAMS)
def test_all_threads_call_the_work_and_have_returned_from_it(compute_together: Callable[..., None]) -> None:
    together, called = threading.Barrier(3, timeout=10), []

    def work() -> None:
        together.wait()
        called.append(threading.get_ident())

    for _ in range(3):
        compute_together(work, 3)
        assert len(set(called)) == 3
        called.clear()


@pytest.mark.skipif(not can_use_team(), reason="torch computes with another OpenMP")
def test_a_released_team_has_no_threads_and_the_next_operation_starts_one(two_threads: None) -> None:
    values = torch.ones(10**6)
    release_team()
    alone = threads_of_this_process()
    for _ in range(2):
        assert float((values + values).sum()) == 2e6
        assert threads_of_this_process() == alone + 1
        release_team()
        assert threads_of_this_process() == alone


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("compute_together", TEAMS)
def test_what_the_work_raises_in_this_thread_is_raised_when_the_others_are_done(compute_together: Callable[..., None]) -> None:
    here, started, done = threading.get_ident(), threading.Event(), []

    def work() -> None:
        if threading.get_ident() == here:
            started.wait(10)
            raise KeyboardInterrupt
        started.set()
        time.sleep(0.02)
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        compute_together(work, 2)
    assert done == [1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no timer signals")
def test_no_interrupt_is_lost_whenever_it_comes(two_threads: None) -> None:
    for _ in range(100):
        with pytest.raises(InterruptedError, match="the timer"):
            compute_until_interrupted(random.uniform(1e-5, 2e-3))
    seen = [0] * 8
    kernels.run_rows(count_rows, 8, seen)
    assert seen == [1] * 8


def compute_until_interrupted(seconds: float) -> None:
    """Raises InterruptedError after so much processor time, or later an AssertionError if that was lost."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise InterruptedError("the timer")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        for _ in range(10_000):
            kernels.run_rows(count_rows, 8, [0] * 8)
        raise AssertionError("no interrupt was raised")
    finally:
        signal.signal(signal.SIGVTALRM, before)


def test_few_rows_are_computed_by_this_thread_alone(two_threads: None) -> None:
    calls = []
    kernels.run_rows(lambda *rows: calls.append((rows, threading.current_thread())), 8, least=5)
    assert calls == [((0, 8), threading.current_thread())]


def test_an_interrupt_waits_for_rows_under_way_and_leaves_the_rest(two_threads: None) -> None:
    started, seen = threading.Event(), []

    def interrupted_here(first: int, stop: int) -> None:
        if threading.current_thread() is here:
            started.wait(10)
            raise KeyboardInterrupt
        started.set()
        time.sleep(0.05)
        seen.append(first)

    here = threading.current_thread()
    with pytest.raises(KeyboardInterrupt):
        kernels.run_rows(interrupted_here, 1000)
    at_return = list(seen)
    time.sleep(0.1)
    assert seen == at_return
    assert len(seen) == 1


def test_an_error_in_another_thread_is_raised_here(two_threads: None) -> None:
    raised = threading.Event()

    def fails_there(first: int, stop: int) -> None:
        if threading.current_thread() is not here:
            raised.set()
            raise ValueError("row 1")
        raised.wait(10)

    here = threading.current_thread()
    with pytest.raises(ValueError, match="row 1"):
        kernels.run_rows(fails_there, 8)


def test_a_forked_child_computes_with_threads_of_its_own(two_threads: None) -> None:
    kernels.run_rows(count_rows, 8, [0] * 8)

    def compute() -> None:
        seen = [0] * 8
        kernels.run_rows(count_rows, 8, seen)
        assert seen == [1] * 8

    assert outcome_in_a_child(compute) == "nothing"


def test_threads_of_the_pool_end_when_idle() -> None:
    compute_in_pool(lambda: time.sleep(0.01), 2)
    deadline = time.monotonic() + 10
    while any(thread.name == "rabbit-kernels" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_kernels_in_use_are_named() -> None:
    assert kernels.kernels_in_use().startswith("numba 0.")
    assert kernels.can_run(torch.device("cpu"))
    assert not kernels.can_run(torch.device("meta"))
    with kernels.torch_operations():
        assert kernels.kernels_in_use() == "torch operations"
        assert not kernels.can_run(torch.device("cpu"))


def test_torchs_own_threads_are_used_on_linux() -> None:
    assert can_use_team() == (sys.platform == "linux")


def test_compiled_code_is_not_used_after_a_change_in_a_file_that_a_kernel_takes_parts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling = "from rabbit_engine.quantization.kernels.compiling import kernel, part\n"
    package = tmp_path / "kernels_of_a_test"
    package.mkdir()
    (package / "whole.py").write_text(
        f"{compiling}from kernels_of_a_test.parts import number\n\n@kernel\ndef found():\n    return number()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for number in (1, 1, 23):
        (package / "parts.py").write_text(f"{compiling}\n@part\ndef number():\n    return {number}\n")
        for name in [name for name in sys.modules if name.startswith(package.name)]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        assert importlib.import_module("kernels_of_a_test.whole").found() == number
    assert len(list(package.glob("__pycache__/*.nbi"))) == 2  # the second time it was not compiled
