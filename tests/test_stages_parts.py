"""Prompts in parts through layers on several devices: the bits of one device that computes the same parts, in as few passes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
import talking
import torch
from conftest import smallest
from long_texts import answer, prompt
from tiny import words

from rabbit_engine import PrefixStore, Session
from rabbit_engine.config import Cut
from rabbit_engine.errors import BudgetError
from rabbit_engine.model.auto import read_settings
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.stages import LocalStage, Opened, load_in_stages
from rabbit_engine.planning import budget, demand
from rabbit_engine.planning.demand import Demand
from rabbit_engine.planning.parts import layer_ring_bytes
from rabbit_engine.sessions.room import Room
from rabbit_engine.streaming import StageRunner

ROWS = 8
FAMILIES = ["llama", "gemma3", "qwen2", "gpt2", "cohere2", "qwen3_next", "lfm2", "falcon_h1", "mixtral"]
"""Plain, with windows, with learnt positions, with states of the whole text, with experts."""

Staged = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "PLANNED_ROWS", ROWS)
    monkeypatch.setattr(demand, "PART_ROWS", (16, ROWS))


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Staged]:
    """A model in three stages, each in the smallest budget whose ring holds a layer; with `resident`, layers elsewhere stay."""
    models: list[Any] = []

    def load(folder: Path, *, resident: bool = False) -> Any:
        cut = {"cut": Cut(least_bytes=1, rest_share=0.0), "max_seq_len": 64, "device": "cpu"}
        settings = read_settings({**cut, "max_memory": smallest(folder, **cut)})

        def open_one(layers: range, nbytes: int) -> LocalStage:
            try:
                return LocalStage(folder, read_settings({**cut, "max_memory": {"cpu": nbytes}}), layers)
            except BudgetError as error:
                return open_one(layers, error.smallest_bytes)

        def open_stages(partition: Any, _: Any) -> Opened:
            layers = len(partition.layout.layers)
            cuts = (1, layers // 2 + 1, layers) if layers > 4 else (1, layers)  # else a stage of one layer would read nothing
            ranges = [range(first, stop) for first, stop in itertools.pairwise(cuts) if stop > first]
            return Opened([open_one(each, 10**9 if resident else 1) for each in ranges])

        with monkeypatch.context() as patch:
            patch.setattr(
                budget, "_for_texts", lambda partition, *_: (0, layer_ring_bytes(partition.sizes, partition.layout.layers))
            )
            models.append(load_in_stages(folder, settings, open_stages))
        assert runtime_of(models[-1]).computes_parts
        assert {stage.reads for stage in runtime_of(models[-1]).assembly.stages} == {not resident}
        return models[-1]

    yield load
    for model in models:
        model.close()


def require_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.scores, expected.scores, strict=True))


@pytest.mark.parametrize(
    ("family", "resident"), [*((family, False) for family in FAMILIES), ("llama", True), ("gemma3", True), ("qwen3_next", True)]
)
def test_families(checkpoint: Any, staged: Staged, parted: Any, plain: Any, family: str, resident: bool) -> None:
    folder, ids = checkpoint(family), prompt(61)
    model, one = staged(folder, resident=resident), parted(folder)
    stages = runtime_of(model).assembly.stages
    answer(model, prompt(5), max_new_tokens=2)  # in which it learns which layers follow one another
    before = [stage.model.profile.passes for stage in stages]
    found = answer(model, ids, prefill_chunk_size=ROWS)
    assert [stage.model.profile.passes - count for stage, count in zip(stages, before, strict=True)] == (
        [12 + 7 if resident else 12] * len(stages)
    )
    require_same(found, answer(one, ids, prefill_chunk_size=ROWS))
    assert torch.equal(found.sequences, answer(plain(folder), ids).sequences)


@pytest.mark.parametrize("resident", [False, True], ids=["reads", "resident"])
def test_padded_batches(checkpoint: Any, staged: Staged, parted: Any, resident: bool) -> None:
    """Each stage makes the masks of a part when its turn comes."""
    for family in ("llama", "gemma3"):
        folder, ids = checkpoint(family), prompt(61, 3)
        mask = (torch.arange(61) >= torch.tensor([0, 23, 8])[:, None]).long()
        keywords = {"attention_mask": mask, "prefill_chunk_size": ROWS, "eos_token_id": None}
        require_same(answer(staged(folder, resident=resident), ids, **keywords), answer(parted(folder), ids, **keywords))


def test_sessions(checkpoint: Any, staged: Staged, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several prompts, beside texts that are whole, share the passes."""
    folder = checkpoint("llama")
    model, whole = staged(folder), plain(folder)
    model.tokenizer = talking.make_tokenizer()
    texts = [prompt(count)[0].tolist() for count in (61, 9, 50)]
    expected = [answer(whole, torch.tensor([text]), max_new_tokens=6).sequences[0, len(text) :].tolist() for text in texts]
    monkeypatch.setattr(Room, "demand", lambda _, tokens, new: Demand(tokens, new, chunk=ROWS if tokens > 20 else None))
    run, counts = StageRunner._run_parts, list[int]()

    def counted(self: Any, work: Any, *rest: Any) -> Any:
        counts.append(len(work.parts))
        return run(self, work, *rest)

    monkeypatch.setattr(StageRunner, "_run_parts", counted)
    with Session(model) as session:
        replies = session.generate(texts, max_new_tokens=6, temperature=0)
    assert set(counts) == {8, 7}
    assert [list(reply.tokens) for reply in replies] == expected


def test_a_stage_without_room_for_a_layer_takes_a_pass_for_each_part(
    checkpoint: Any, staged: Staged, parted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that took the place of another after the prompt was admitted."""
    folder, ids = checkpoint("llama"), prompt(61)
    model = staged(folder)
    for stage in runtime_of(model).assembly.stages:
        monkeypatch.setattr(stage._runner, "_computes_parts", False)
    require_same(answer(model, ids, prefill_chunk_size=ROWS), answer(parted(folder), ids, prefill_chunk_size=ROWS))


def test_a_stage_that_is_closed_amid_a_prompt_ends_it(checkpoint: Any, staged: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a cluster cancels what it was asked: nobody waits for an answer that never comes."""
    model = staged(checkpoint("llama"))
    cancelled: Future[Any] = Future()
    cancelled.cancel()
    monkeypatch.setattr(runtime_of(model).assembly.stages[-1], "submit", lambda _: cancelled)
    with pytest.raises(CancelledError):
        answer(model, prompt(61), prefill_chunk_size=ROWS)


def test_an_error_amid_a_prompt_ends_it_alone(checkpoint: Any, staged: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = staged(checkpoint("llama")), prompt(61)
    expected = answer(model, ids, prefill_chunk_size=ROWS)
    run = StageRunner._run_calls
    calls = itertools.count()

    def fail_once(self: Any, *given: Any) -> Any:
        if next(calls) == 3:
            raise ArithmeticError("of a layer")
        return run(self, *given)

    monkeypatch.setattr(StageRunner, "_run_calls", fail_once)
    with pytest.raises(ArithmeticError, match="of a layer"):
        answer(model, ids, prefill_chunk_size=ROWS)
    require_same(answer(model, ids, prefill_chunk_size=ROWS), expected)


@pytest.mark.parametrize("resident", [False, True], ids=["reads", "resident"])
@pytest.mark.parametrize("family", ["gemma3", "qwen3_next", "lfm2"])
def test_what_layers_elsewhere_forget_is_stored(
    own_checkpoint: Any, checkpoint: Any, staged: Staged, parted: Any, tmp_path: Path, family: str, resident: bool
) -> None:
    """The next turn begins where the last prompt ended, with the bits of one device: but where that reads experts on demand, and
    so computes in other parts."""
    folder = own_checkpoint(family, sliding_window=8) if family == "gemma3" else checkpoint(family)
    first = prompt(37)[0].tolist()
    texts = [first, [*first, *prompt(20)[0].tolist()]]
    found: list[list[tuple[Any, ...]]] = []
    for name, model in (("stages", staged(folder, resident=resident)), ("one", parted(folder))):
        model.tokenizer = words(96)
        with PrefixStore(tmp_path / name, 10**8, block_tokens=ROWS) as store:
            replies = []
            for text in texts:
                with Session(model, prefix_store=store) as session:
                    replies += session.generate([text], max_new_tokens=6, ignore_eos=True, logprobs=3)
                assert store.flush(30)
        found.append([(reply.tokens, reply.logprobs, reply.cached_tokens) for reply in replies])
        if not model.plan.experts.layers:
            assert found[0] == found[-1]
    assert [(tokens, cached) for tokens, _, cached in found[0]] == [(tokens, cached) for tokens, _, cached in found[1]]
    assert [cached for _, _, cached in found[0]] == [0, 32]


def test_no_part_overtakes_another_while_it_is_learnt_which_layers_follow_one_another(
    checkpoint: Any, staged: Staged, parted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part comes to the last stage before the first is done there, the third once more is known."""
    folder, ids = checkpoint("gemma3"), prompt(24)
    keywords = {"prefill_chunk_size": ROWS, "max_new_tokens": 2}
    expected = answer(parted(folder), ids, **keywords)
    model, run = staged(folder, resident=True), StageRunner._run_calls

    def slowly(self: Any, calls: Any, given: Any) -> Any:
        time.sleep(0.04 if calls[0].layer < 4 else 0.06)
        return run(self, calls, given)

    monkeypatch.setattr(StageRunner, "_run_calls", slowly)
    require_same(answer(model, ids, **keywords), expected)
