"""Models whose layers are divided among several devices: the answers of transformers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from conftest import smallest
from long_texts import answer, prompt
from tiny import words

from rabbit_engine import Session
from rabbit_engine.errors import BudgetError
from rabbit_engine.model.auto import read_settings
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.stages import LocalStage, Opened, load_in_stages
from rabbit_engine.streaming import StageRequest, StageRunner, fiber_on
from rabbit_engine.streaming.scheduler import SharedPass
from rabbit_engine.streaming.stages.stage import Calls, LayerCall

Staged = Callable[..., Any]


@pytest.fixture
def staged() -> Iterator[Staged]:
    """A model whose layers from the second on are two stages, each in the smallest budget that it runs in.

    With `turns` of two they take turns with pairs of layers, with three the model takes turns with them.
    """
    models: list[Any] = []

    def load(folder: Path, bounds: tuple[int, ...] | None = None, turns: int = 0, **keywords: Any) -> Any:
        settings = read_settings({"device": "cpu", "max_memory": smallest(folder), **keywords})

        def open_stages(partition: Any, _: Any) -> Opened:
            layers = len(partition.layout.layers)
            cuts = bounds or (1, (layers + 1) // 2 if layers > 3 else 2, layers)
            ranges: list[Sequence[int]] = [range(first, stop) for first, stop in itertools.pairwise(cuts) if stop > first]
            if turns:
                ranges = [dealt(turn, turns, layers) for turn in (0, 1)]
            return Opened([_smallest_stage(folder, settings, each) for each in ranges])

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


def _smallest_stage(folder: Path, settings: Any, layers: Sequence[int]) -> LocalStage:
    try:
        return LocalStage(folder, replace(settings, stream=replace(settings.stream, device_budget_bytes=1)), layers)
    except BudgetError as error:
        return LocalStage(
            folder, replace(settings, stream=replace(settings.stream, device_budget_bytes=error.smallest_bytes)), layers
        )


def dealt(turn: int, turns: int, layers: int) -> list[int]:
    """Every so many pairs of the layers from the second on."""
    return [layer for layer in range(1, layers) if (layer - 1) // 2 % turns == turn]


@pytest.mark.parametrize("turns", [2, 3])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *[(family, {"num_hidden_layers": 13}) for family in ("llama", "gemma3", "mixtral", "mamba")],
        ("qwen3_next", {"num_hidden_layers": 12}),
        ("gemma3n", {}),
        ("gpt2", {"num_hidden_layers": 13, "n_layer": 13}),
    ],
)
def test_stages_that_take_turns(
    family: str, changes: dict[str, int], turns: int, own_checkpoint: Any, staged: Staged, plain: Any
) -> None:
    folder = own_checkpoint(family, **changes)
    model = staged(folder, turns=turns)
    assert all(stage.assembly.transfer.units for stage in runtime_of(model).assembly.stages) or family == "gemma3n"
    _answers_in_turns(model, plain(folder), turns)


def test_stages_that_take_turns_without_a_cache(staged: Staged, plain: Any, tmp_path: Path) -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=9, n_head=4, n_positions=64)
    transformers.OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path)
    _answers_in_turns(staged(tmp_path, turns=2), plain(tmp_path), 2)


def _answers_in_turns(model: Any, whole: Any, turns: int) -> None:
    """Both give the same answers; at last each range of layers is one request."""
    stages, layers = runtime_of(model).assembly.stages, model.config.num_hidden_layers
    assert [list(stage.layers) for stage in stages] == [dealt(turn, turns, layers) for turn in (0, 1)]
    asked: list[list[int]] = []
    for ids in (prompt(19), prompt(5)):
        found, expected = (answer(one, ids) for one in (model, whole))
        assert torch.equal(found.sequences, expected.sequences)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.scores, expected.scores, strict=True))
        with pytest.MonkeyPatch.context() as patch:
            for stage in stages:
                patch.setattr(stage, "submit", functools.partial(_noted, stage._runner.submit, asked))
            asked.clear()
            answer(model, ids, max_new_tokens=1)
    pairs = [[first, second] for first, second in zip(range(1, layers, 2), range(2, layers, 2), strict=False)]
    pairs += [[layers - 1]] if layers % 2 == 0 else []
    assert asked == [pair for pair in pairs if any(pair[0] in stage.layers for stage in stages)]


def _noted(submit: Any, asked: list[list[int]], request: Any) -> Any:
    asked.append(list(request.layers))
    return submit(request)


def test_a_stage_reads_its_next_range_while_others_compute(
    own_checkpoint: Any, staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = staged(own_checkpoint("llama", num_hidden_layers=9), turns=2)
    answer(model, prompt(5), max_new_tokens=3)
    stage = runtime_of(model).assembly.stages[0]
    transfer = stage.assembly.transfer
    found: list[tuple[int, str]] = []

    def submit(request: Any) -> Any:
        transfer.wait_until_idle()  # what it reads before it is asked
        found.append((request.layers[0], transfer._queue._queue[0].unit.name))
        return stage._runner.submit(request)

    monkeypatch.setattr(stage, "submit", submit)
    answer(model, prompt(5), max_new_tokens=2)
    assert [layer for layer, _ in found] == [1, 5, 1, 5]
    assert all(name.startswith(f"model.layers.{layer}") for layer, name in found)


def test_texts_that_return_at_different_times_share_the_reads(
    own_checkpoint: Any, staged: Staged, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own ranges between those of its stages: each unit is read once a pass for all texts."""
    folder = own_checkpoint("llama", num_hidden_layers=9)
    model = staged(folder, turns=3, prefetching=False)
    model.tokenizer = words(96)
    runtime = runtime_of(model)
    texts = [[*range(5, 12), 20 + index] for index in range(3)]
    monkeypatch.setattr(runtime.transfer, "pass_read_s", 30.0)
    for stage in runtime.assembly.stages:
        monkeypatch.setattr(stage, "submit", functools.partial(_later, stage._runner.submit))
    with Session(model, prefix_store=None, max_requests=3) as session:
        for count in (1, 4):
            before = runtime.transfer.profile()
            found = [list(one.tokens) for one in session.generate(texts, max_new_tokens=count)]
    after = runtime.transfer.profile()
    for text, tokens in zip(texts, found, strict=True):
        theirs = plain(folder).generate(torch.tensor([text]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert tokens == theirs[0, len(text) :].tolist()
    passes = after.passes - before.passes
    assert passes <= 5
    assert after.loads - before.loads == passes * len(runtime.transfer.units)


def _later(submit: Any, request: Any, numbers: Any = itertools.count()) -> Future[Any]:  # noqa: B008 - of all requests
    """The answer, some earlier, some later."""
    future: Future[Any] = Future()
    done = submit(request)
    threading.Timer(0.01 * (next(numbers) % 3), lambda: future.set_result(done.result())).start()
    return future


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


class CountedCalls:
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


Shared = Callable[[float], tuple[StageRunner, CountedCalls]]


@pytest.fixture
def running() -> Iterator[Shared]:
    runners: list[StageRunner] = []

    def run(read_s: float) -> tuple[StageRunner, CountedCalls]:
        calls = CountedCalls(read_s)
        runners.append(
            StageRunner(
                {0: torch.nn.Identity(), 1: torch.nn.Identity()},
                calls,
                torch.device("cpu"),
                "here",
                make_text=lambda _: None,
                layer_of=str,
            )
        )
        return runners[-1], calls

    yield run
    for runner in runners:
        runner.close()


def request(number: int, texts: int, layer: int = 0, scheduler: str = "one") -> StageRequest:
    return StageRequest(Calls((LayerCall(layer, (torch.ones(1),), {}),)), shared=SharedPass(scheduler, number, texts))


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
    alone = StageRequest(Calls((LayerCall(0, (torch.ones(1),), {}),)))
    futures = [runner.submit(one) for one in (request(1, 2), request(7, 1, scheduler="two"), alone, request(1, 2, layer=1))]
    time.sleep(0.05)
    assert not any(future.done() for future in futures[:1])
    futures += [runner.submit(request(1, 2)), runner.submit(request(1, 2, layer=1))]
    wait(futures, timeout=5)
    assert sum(calls.passes) == 6
