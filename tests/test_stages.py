"""Models whose layers are divided among several devices: the answers of transformers."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import smallest
from long_texts import answer, prompt

from rabbit_engine import Session
from rabbit_engine.model.auto import read_settings
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.stages import LocalStage, Opened, load_in_stages
from rabbit_engine.streaming import StageRequest, StageRunner, fiber_on
from rabbit_engine.streaming.scheduler import SharedPass
from rabbit_engine.streaming.stages.stage import LayerCall

Staged = Callable[..., Any]


@pytest.fixture
def staged() -> Iterator[Staged]:
    """A model whose layers from the second on are two stages, all in the smallest budget that the whole model runs in."""
    models: list[Any] = []

    def load(folder: Path, bounds: tuple[int, ...] | None = None, **keywords: Any) -> Any:
        settings = read_settings({"device": "cpu", "max_memory": smallest(folder), **keywords})

        def open_stages(partition: Any, _: Any) -> Opened:
            layers = len(partition.layout.layers)
            cuts = bounds or (1, (layers + 1) // 2 if layers > 3 else 2, layers)
            ranges = [range(first, stop) for first, stop in itertools.pairwise(cuts) if stop > first]
            return Opened([LocalStage(folder, settings, each) for each in ranges])

        models.append(load_in_stages(folder, settings, open_stages))
        return models[-1]

    yield load
    for model in models:
        model.close()


@pytest.mark.parametrize("family", [*families.FAMILIES, *families.MORE])
def test_families(checkpoint: Any, staged: Staged, plain: Any, family: str) -> None:
    folder = checkpoint(family)
    model = staged(folder)
    found, expected = (answer(one, prompt(19)) for one in (model, plain(folder)))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.scores, expected.scores, strict=True))
    stages = runtime_of(model).assembly.stages
    assert all(stage.model.profile.passes >= 2 for stage in stages)


def test_texts_of_a_session_share_the_passes_of_a_stage(checkpoint: Any, staged: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that reads weights waits for all of them, and for no others."""
    model = staged(checkpoint("gemma3"), (1, 7))
    stage = runtime_of(model).assembly.stages[0]
    monkeypatch.setattr(stage.assembly.transfer, "pass_read_s", 30.0)
    answer(model, prompt(5), max_new_tokens=3)
    requests: list[Any] = []
    passes = stage.model.profile.passes

    def late(request: Any) -> Any:
        requests.append(request)
        if len(requests) % 3 == 0:
            time.sleep(0.02)
        return stage._runner.submit(request)

    monkeypatch.setattr(stage, "submit", late)
    prompts = [[5 + text] * 5 for text in range(3)]
    with Session(model, prefix_store=None) as session:
        texts = [list(found.tokens) for found in session.generate(prompts, max_new_tokens=6, min_new_tokens=6)]
    monkeypatch.undo()
    alone = [answer(model, torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6).sequences[0, 5:].tolist() for ids in prompts]
    assert texts == alone
    assert stage.model.profile.passes - passes - 3 * 6 <= len(requests) // 3 + 2  # those alone had passes of their own


def test_what_follows_a_stage_is_read_once_for_all_texts(
    checkpoint: Any, staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts come back from the stage one by one."""
    model = staged(checkpoint("gemma3"), (1, 5))
    stage = runtime_of(model).assembly.stages[0]
    answer(model, prompt(5), max_new_tokens=3)
    monkeypatch.setattr(runtime_of(model).transfer, "pass_read_s", 30.0)
    submit, count = stage.submit, itertools.count()

    def slow(request: Any) -> Any:
        found: Future[Any] = Future()

        def tell(future: Any) -> None:
            threading.Timer(0.03 * (next(count) % 3), lambda: found.set_result(future.result())).start()

        submit(request).add_done_callback(tell)
        return found

    monkeypatch.setattr(stage, "submit", slow)
    before = model.profile
    with Session(model, prefix_store=None) as session:
        session.generate([[5 + text] * 5 for text in range(3)], max_new_tokens=4, min_new_tokens=4)
    after = model.profile
    for name in ("model.layers.5", "model.layers.6", "lm_head"):
        assert 0 < after.units[name].loads - before.units[name].loads <= after.passes - before.passes


class Calls:
    """A binding that counts passes, and layers that return what they are given."""

    def __init__(self, read_s: float) -> None:
        self.passes: list[int] = []
        self.pass_read_s = read_s

    @contextlib.contextmanager
    def scheduled_pass(self) -> Iterator[None]:
        self.passes.append(0)
        yield

    @contextlib.contextmanager
    def root_pass(self, _: int) -> Iterator[None]:
        fiber_on(self).await_start()
        self.passes[-1] += 1
        yield


Shared = Callable[[float], tuple[StageRunner, Calls]]


@pytest.fixture
def running() -> Iterator[Shared]:
    runners: list[StageRunner] = []

    def run(read_s: float) -> tuple[StageRunner, Calls]:
        calls = Calls(read_s)
        runners.append(
            StageRunner(
                {0: torch.nn.Identity(), 1: torch.nn.Identity()}, calls, torch.device("cpu"), "here", make_text=lambda _: None
            )
        )
        return runners[-1], calls

    yield run
    for runner in runners:
        runner.close()


def request(number: int, texts: int, layer: int = 0, scheduler: str = "one") -> StageRequest:
    return StageRequest((LayerCall(layer, (torch.ones(1),), {}),), 1, shared=SharedPass(scheduler, number, texts))


def test_a_pass_begins_when_all_its_texts_have_come(running: Shared) -> None:
    runner, calls = running(30.0)
    for number in range(3):
        futures = []
        for text in range(3):
            assert not any(future.done() for future in futures)
            time.sleep(0.02)
            futures.append(runner.submit(request(number, 3 if text else 4)))  # the newest word counts: a text has ended
        wait(futures)
    assert calls.passes == [3, 3, 3]


def test_a_pass_waits_no_longer_than_reading_again_would_take(running: Shared) -> None:
    runner, calls = running(0.05)
    first = [runner.submit(request(1, 4)) for _ in range(2)]
    wait(first)
    rest = [runner.submit(request(1, 4)) for _ in range(2)]  # nobody else is expected
    wait(rest, timeout=0.04)
    assert all(future.done() for future in rest)
    assert calls.passes[0] == 2
    assert sum(calls.passes) == 4


def test_a_stage_that_reads_nothing_waits_for_nobody(running: Shared) -> None:
    runner, _ = running(0.0)
    assert runner.submit(request(1, 9)).result(5).output is not None


def test_passes_of_several_schedulers_and_layers(running: Shared) -> None:
    runner, calls = running(30.0)
    alone = StageRequest((LayerCall(0, (torch.ones(1),), {}),), 1)
    futures = [runner.submit(one) for one in (request(1, 2), request(7, 1, scheduler="two"), alone, request(1, 2, layer=1))]
    time.sleep(0.05)
    assert not any(future.done() for future in futures[:1])
    futures += [runner.submit(request(1, 2)), runner.submit(request(1, 2, layer=1))]
    wait(futures, timeout=5)
    assert sum(calls.passes) == 6
