"""What the driver does when workers end, with workers in this process: real layers, requests in bytes, no Ray."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import talking
import torch
from conftest import smallest
from guessing import Guided
from long_texts import BLOCK, answer, made_caches, prompt
from transformers import DynamicCache

from rabbit_engine import PrefixStore, Session
from rabbit_engine.cluster import stage as stages
from rabbit_engine.cluster.paces import StagePaces
from rabbit_engine.cluster.request_log import RequestLog
from rabbit_engine.cluster.stage import ClusterStage
from rabbit_engine.cluster.worker import OpenedThere, WorkerEndedError
from rabbit_engine.decoding.lookup import Lookup
from rabbit_engine.errors import StageLostError
from rabbit_engine.model.assembly import Assembly
from rabbit_engine.model.auto import read_settings
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.stages import LocalStage, Opened, load_in_stages
from rabbit_engine.planning import demand as demands
from rabbit_engine.streaming import StageRunner
from rabbit_engine.transformers_bridge.tiered_layers import TieredLayer


class WorkerHere:
    """A stage that is asked in bytes, as one on another machine, and ends when `ends(number of the request)` says so: before it
    has answered, or with the answer lost."""

    numbers = itertools.count()

    def __init__(self, opened: LocalStage, ends: Callable[[], str]) -> None:
        self.machine, self.number = "here", f"{next(self.numbers)}"
        self.opened = OpenedThere(0, opened.kernels, opened.reads, opened.computes_parts, "")
        self._stage, self._ends, self._ended = opened, ends, False

    def run(self, request: bytes) -> bytes:
        when = self._ends()
        self._require_alive(ended=when == "before")
        found = pickle.dumps(self._stage.submit(pickle.loads(request)).result())
        self._require_alive(ended=when == "after")
        return found

    def fork(self, text: str, changes: bytes, copied: str) -> None:
        self._require_alive()
        self._stage.fork(text, pickle.loads(changes), copied)

    def forget(self, text: str) -> None:
        self._stage.forget(text)

    def adapt(self, name: str, modules: bytes) -> None:
        self._require_alive()
        self._stage.adapt(name, modules)

    def withdraw(self, name: str) -> None:
        self._stage.withdraw(name)

    def free_bytes(self) -> int:
        return self._stage.free_bytes()

    def tier_bytes(self) -> int:
        return self._stage.tier_bytes()

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._stage.close()

    def _require_alive(self, *, ended: bool = False) -> None:
        if ended:
            self.close()
        if self._ended:
            raise WorkerEndedError("the worker here ended")


class Here:
    """Starts workers in this process; `ends` decides for each request of all of them."""

    def __init__(self, folder: Path, settings: Any) -> None:
        self._folder, self._settings = folder, settings
        self.started = self.requests = 0
        self.ends: Callable[[int], str] = lambda _: ""

    def start(self, layers: tuple[int, ...]) -> Any:
        self.started += 1
        return WorkerHere(LocalStage(self._folder, self._settings, layers), self._when)

    def _when(self) -> str:
        self.requests += 1
        return self.ends(self.requests)


Staged = Callable[..., tuple[Any, Here]]


@pytest.fixture
def over_workers() -> Iterator[Staged]:
    models: list[Any] = []

    def load(folder: Path, planned_s: float = 0.0, *, turns: bool = False) -> tuple[Any, Here]:
        settings = read_settings({"device": "cpu", "max_memory": smallest(folder)})
        here, log = Here(folder, settings), RequestLog(None)

        def open_stages(partition: Any, _: Any) -> Opened:
            last = len(partition.layout.layers)
            ranges = (range(1, last, 2), range(2, last, 2)) if turns else (range(1, 2), range(2, last))
            return Opened([ClusterStage(each, here, log, StagePaces(), planned_s) for each in ranges])

        models.append(load_in_stages(folder, settings, open_stages))
        return models[-1], here

    yield load
    for model in models:
        model.close()


WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}, "speculated": {"speculate": Lookup(nodes=6)}}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_workers_that_end_amid_a_text(
    checkpoint: Any, over_workers: Staged, plain: Any, family: str, way: str, when: str
) -> None:
    folder = checkpoint(family)
    keywords = {"max_new_tokens": 8, **WAYS[way]}
    theirs = {name: value for name, value in keywords.items() if name != "speculate"}
    expected = answer(plain(folder), prompt(11), **theirs).sequences
    model, here = over_workers(folder)
    here.ends = lambda number: when if number in (3, 9, 25) else ""
    assert torch.equal(answer(model, prompt(11), **keywords).sequences, expected)
    assert here.started >= 3


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_workers_with_several_ranges_that_end(checkpoint: Any, over_workers: Staged, plain: Any, family: str, when: str) -> None:
    """The first ends amid a pass: some of its layers have computed the new token, others have not."""
    folder = checkpoint(family)
    expected = answer(plain(folder), prompt(11), max_new_tokens=8).sequences
    model, here = over_workers(folder, turns=True)
    layers = model.config.num_hidden_layers
    first = layers - 1  # requests of a pass: each layer is one
    here.ends = lambda number: when if number in (first + 3, 4 * first + 1) else ""
    assert torch.equal(answer(model, prompt(11), max_new_tokens=8).sequences, expected)
    assert here.started == 4


def test_states_of_the_whole_text_are_computed_again(checkpoint: Any, over_workers: Staged, plain: Any) -> None:
    folder = checkpoint("qwen3_next")
    expected = answer(plain(folder), prompt(11), max_new_tokens=6).sequences
    model, here = over_workers(folder)
    here.ends = lambda number: "after" if number == 9 else ""
    assert torch.equal(answer(model, prompt(11), max_new_tokens=6).sequences, expected)
    assert here.started == 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_states_before_a_wrong_guess_are_computed_again(checkpoint: Any, over_workers: Staged, plain: Any, when: str) -> None:
    folder = checkpoint("qwen3_next")
    expected = answer(plain(folder), prompt(11), max_new_tokens=20).sequences
    model, here = over_workers(folder)
    here.ends = lambda number: when if number in (9, 14, 40) else ""
    draft = Guided(expected[0].tolist(), agreement=0.6, branches=1, nodes=6)
    assert torch.equal(answer(model, prompt(11), max_new_tokens=20, speculate=draft).sequences, expected)
    assert here.started >= 4


def test_a_copy_of_a_text_goes_on_by_itself(checkpoint: Any, over_workers: Staged, plain: Any) -> None:
    """Both texts are computed again, from what they share and from what they added."""
    folder = checkpoint("llama")
    model, here = over_workers(folder)
    expected = []
    found = []
    for one, results in ((plain(folder), expected), (model, found)):
        cache = DynamicCache(config=one.config.get_text_config())
        ids = prompt(11)
        with torch.no_grad():
            one(ids, past_key_values=cache)
            cache.crop(-2)
            other = copy.deepcopy(cache)
            if one is model:
                here.ends = lambda number: "before" if number in (9, 30) else ""
            for step in range(6):
                for text, token in ((cache, step), (other, 40 + step)):
                    results.append(one(torch.tensor([[5 + token]]), past_key_values=text).logits)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert here.started == 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_workers_that_end_amid_the_parts_of_a_prompt(checkpoint: Any, over_workers: Staged, parted: Any, when: str) -> None:
    folder = checkpoint("llama")
    expected = answer(parted(folder), prompt(61), prefill_chunk_size=8)
    model, here = over_workers(folder)
    assert runtime_of(model).computes_parts
    answer(model, prompt(5), max_new_tokens=2)
    begun, here.requests = here.requests, 0
    here.ends = lambda number: when if number in (3, 9, 25) else ""
    found = answer(model, prompt(61), prefill_chunk_size=8)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.scores, expected.scores))
    assert here.requests > begun + 2 * 12 + 2 * 7  # a request for each part, as nothing is read there
    assert here.started == 5


@pytest.mark.parametrize("when", ["before", "after"])
def test_beginnings_are_stored_and_read_while_workers_end(
    checkpoint: Any, over_workers: Staged, plain: Any, tmp_path: Path, when: str
) -> None:
    folder = checkpoint("llama")
    texts = [[5, *range(7, 40)], [5, *range(7, 30), 8, 8]]
    expected = [
        answer(plain(folder), torch.tensor([text]), max_new_tokens=6).sequences[0, len(text) :].tolist() for text in texts
    ]
    model, here = over_workers(folder)
    model.tokenizer = talking.make_tokenizer()
    here.ends = lambda number: when if number in (4, 8, 30, 47) else ""
    with PrefixStore(tmp_path / "store", 10**8, block_tokens=8) as store:
        for cached in ([0, 24], [32, 24]):
            with Session(model, prefix_store=store) as session:
                replies = [session.generate([text], max_new_tokens=6, temperature=0)[0] for text in texts]
                assert store.flush(30)
            assert [list(reply.tokens) for reply in replies] == expected
            assert [reply.cached_tokens for reply in replies] == cached
    assert here.started == 6


def test_a_text_that_does_not_fit_on_a_machine_lies_in_tiers_there(
    tmp_path: Path, over_workers: Staged, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = families.save("llama", tmp_path / "model", num_hidden_layers=12)
    expected = answer(plain(folder), prompt(400)).sequences
    model, here = over_workers(folder)
    monkeypatch.setattr(demands, "_TAIL_TOKENS", 3 * BLOCK)
    monkeypatch.setattr(demands, "BLOCK_TOKENS", BLOCK)
    probe = runtime_of(model).partition.probe
    assert probe.growing_layers == 10  # of the largest stage
    need = demands.need_bytes(probe, demands.Demand(400, 12, tiered=6)) + demands.KEPT_FREE_BYTES
    monkeypatch.setattr(Assembly, "free_bytes", lambda _: need)
    here.ends = lambda number: "after" if number == 9 else ""
    cached: list[Any] = []
    run = StageRunner._run
    monkeypatch.setattr(StageRunner, "_run", lambda self, asked: (run(self, asked), cached.extend(self._texts.values()))[0])
    with made_caches(monkeypatch, tmp_path):
        assert torch.equal(answer(model, prompt(400)).sequences, expected)
    assert here.started == 3
    assert {sum(isinstance(layer, TieredLayer) for layer in cache.layers) for cache in cached} == {1, 6}
    assert max(cache.text.bytes_written for cache in cached) > 0


def test_workers_that_only_end_are_an_error(checkpoint: Any, over_workers: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_MOST_TRIES", 3)
    model, here = over_workers(checkpoint("llama"))
    here.ends = lambda _: "before"
    with pytest.raises(StageLostError, match="3 workers for layer 1 ended one after another"):
        answer(model, prompt(11))


def test_a_worker_that_cannot_be_ended_is_named_and_replaced(
    checkpoint: Any, over_workers: Staged, plain: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, close = checkpoint("llama"), WorkerHere.close

    def unreachable(worker: WorkerHere) -> None:
        if worker._ended:
            raise ConnectionError("no route to it")
        close(worker)

    monkeypatch.setattr(WorkerHere, "close", unreachable)
    model, here = over_workers(folder)
    here.ends = lambda number: "before" if number == 3 else ""
    assert torch.equal(answer(model, prompt(11)).sequences, answer(plain(folder), prompt(11)).sequences)
    assert "the worker on here may still run: no route to it" in caplog.text


def test_a_text_whose_requests_could_not_be_kept_is_an_error_only_if_its_worker_ends(
    checkpoint: Any, over_workers: Staged, plain: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint("llama")
    model, here = over_workers(folder)
    expected = answer(plain(folder), prompt(11)).sequences

    def full(*_: object) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr("rabbit_engine.storage.scratchfile.ScratchFile._move", full)
    assert torch.equal(answer(model, prompt(11)).sequences, expected)
    assert "No space left on device" in caplog.text
    here.ends = lambda number: "before" if number == here_now + 9 else ""
    here_now = here.requests
    with pytest.raises(StageLostError, match="too full"):
        answer(model, prompt(11))


def test_a_machine_that_becomes_slow_is_named_once(
    checkpoint: Any, over_workers: Staged, caplog: pytest.LogCaptureFixture
) -> None:
    model, here = over_workers(checkpoint("llama"), planned_s=0.04)
    with caplog.at_level(logging.WARNING):
        answer(model, prompt(11), max_new_tokens=10)
        assert "is slow" not in caplog.text
        here.ends = lambda _: time.sleep(0.15) or ""
        answer(model, prompt(11), max_new_tokens=10)
    named = [message for message in caplog.messages if message.startswith("here is slow: a pass of its layer")]
    assert len(named) == 2  # one line a stage
    assert "times what was planned, and at first it took" in named[0]


def test_passes_of_several_texts_say_nothing_of_a_machine(
    checkpoint: Any, over_workers: Staged, caplog: pytest.LogCaptureFixture
) -> None:
    """Each waits for the others."""
    model, here = over_workers(checkpoint("llama"), planned_s=0.02)
    model.tokenizer = talking.make_tokenizer()
    texts = [prompt(count)[0].tolist() for count in (5, 6, 7)]
    with caplog.at_level(logging.WARNING), Session(model) as session:
        session.generate(texts, max_new_tokens=9, ignore_eos=True)
        here.ends = lambda _: time.sleep(0.1) or ""
        session.generate(texts, max_new_tokens=9, ignore_eos=True)
    assert "is slow" not in caplog.text


def test_a_stage_is_slow_against_the_others() -> None:
    paces, (one, two, three) = StagePaces(), ((0, 1), (2, 3), (4, 5))

    def passes(layers: tuple[int, ...], ratio: float, count: int = 8) -> list[str]:
        return [reason for _ in range(count) if (reason := paces.note(layers, ratio)) is not None]

    assert passes(one, 5.0) + passes(two, 6.0) == [], "they share cores"
    assert passes(three, 11.0) == []
    (reason,) = passes(three, 12.0)
    assert reason == "11.5 times what was planned, and the other machines take 5.5 times"
    assert passes(three, 30.0) == [], "once"
    assert passes(two, 0.1) + passes(one, 0.1) + passes(three, 0.1) == []
    assert passes(one, 1.9) == [], "what is within twice its plan is not slow, whatever the others do"
    paces.forget(three)
    assert passes(three, 30.0, count=7) == [], "too few passes of the new worker"
    assert len(passes(three, 30.0, count=2)) == 1


def test_nothing_is_kept_of_texts_that_ended(checkpoint: Any, over_workers: Staged) -> None:
    model, _ = over_workers(checkpoint("llama"))
    answer(model, prompt(11))
    for stage in model._assembly.stages:
        assert stage._states == {}
        assert stage._log._texts == {}
        assert stage._log.nbytes == 0


def test_what_is_inside_layers_comes_from_the_worker_that_follows(checkpoint: Any, over_workers: Staged, plain: Any) -> None:
    whole, (model, here) = plain(checkpoint("llama")), over_workers(checkpoint("llama"))
    for one in (whole, model):
        one.set_attn_implementation("eager")
    asked = {"max_new_tokens": 6, "output_attentions": True, "return_dict_in_generate": True}
    expected = [one for each in answer(whole, prompt(11), **asked).attentions for one in each]
    here.ends = lambda number: "after" if number in (5, 11) else ""
    found = [one for each in answer(model, prompt(11), **asked).attentions for one in each]
    assert here.started == 4
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
