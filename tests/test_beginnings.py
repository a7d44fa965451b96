"""Texts that begin alike in one session: one computes the beginning, the others wait for that pass and copy it."""

from __future__ import annotations

import errno
import gc
import json
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import words
from transformers import DynamicCache

from rabbit_engine import PrefixStore, Reply, Session
from rabbit_engine.batches import BatchJob, Choices
from rabbit_engine.model import tiered_caches
from rabbit_engine.planning import texts
from rabbit_engine.prefixes.folder import StoreFolder
from rabbit_engine.sessions import known_prefixes
from rabbit_engine.sessions.engine import Engine
from rabbit_engine.streaming import BlockHome

BLOCK = 8
ASKED: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    with PrefixStore(tmp_path / "prefixes", 10**8, block_tokens=BLOCK) as store:
        yield store


@pytest.fixture
def load(parted: Any) -> Callable[..., Any]:
    """Load so that prompts may be computed in parts. `model.rows` are those that each forward of the first layer computed, also
    those that failed."""

    def loaded(folder: Path) -> Any:
        model = parted(folder)
        model.tokenizer = words(96)
        model.rows = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: model.rows.append(inputs[0].shape[1]))
        return model

    return loaded


@pytest.fixture
def llama(checkpoint: Any, load: Any) -> Any:
    return load(checkpoint("llama"))


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return [int(token) for token in torch.randint(5, 90, (tokens,), generator=torch.Generator().manual_seed(seed))]


def alike(count: int, common: int = 20, own: int = 9, seed: int = 1) -> list[list[int]]:
    """Texts with a common beginning; each is as long as the others."""
    return [prompt(common, seed) + prompt(own, 100 * seed + number) for number in range(count)]


def alone(model: Any, ids: list[int], tokens: int = 6) -> tuple[int, ...]:
    found = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0, prefill_chunk_size=BLOCK)
    return tuple(found[0, len(ids) :].tolist())


class Answers:
    """Replies and failures of requests, by their index."""

    def __init__(self, session: Session, prompts: list[list[int]], **options: Any) -> None:
        self._events: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        requests = [session.request_text(ids, **(ASKED | options)) for ids in prompts]
        self._count = len(requests)
        self.tickets = session.ask(requests, lambda index, event: self._events.put((index, event)))

    def wait(self) -> dict[int, Any]:
        ended: dict[int, Any] = {}
        while len(ended) < self._count:
            index, event = self._events.get(timeout=30)
            if isinstance(event, Reply | BaseException):
                ended[index] = event
        return ended


def run(model: Any, store: PrefixStore, prompts: list[list[int]], **options: Any) -> tuple[list[Reply], list[int], int]:
    """The replies, the rows of the first layer's forwards, and the number of passes."""
    with Session(model, prefix_store=store) as session:
        model.rows.clear()
        before = model.profile.passes
        replies = session.generate(prompts, **(ASKED | options))
    return replies, list(model.rows), model.profile.passes - before


def test_a_common_beginning_is_computed_once(llama: Any, store: PrefixStore) -> None:
    asked = alike(5)
    expected = [alone(llama, ids) for ids in asked]
    replies, rows, passes = run(llama, store, asked)
    assert [reply.tokens for reply in replies] == expected
    assert [reply.cached_tokens for reply in replies] == [0, 16, 16, 16, 16]
    assert sum(rows) == 29 + 4 * 13 + 5 * 5
    assert passes == 7  # those of a text alone, and one for which the others waited


def test_all_bits_are_those_of_a_text_alone(llama: Any, store: PrefixStore, tmp_path: Path) -> None:
    asked = alike(3)
    together, *_ = run(llama, store, asked, logprobs=5)
    for index, ids in enumerate(asked):
        with PrefixStore(tmp_path / f"store{index}", 10**8, block_tokens=BLOCK) as own:
            assert run(llama, own, [ids], logprobs=5)[0][0].logprobs == together[index].logprobs


def test_several_beginnings_at_once_and_texts_of_their_own_wait_for_no_other(llama: Any, store: PrefixStore) -> None:
    first, second = alike(2), alike(3, common=25, own=5, seed=2)
    asked = [first[0], second[0], prompt(30, 3), first[1], second[1], second[2], prompt(9, 4)]
    replies, rows, passes = run(llama, store, asked)
    assert [reply.tokens for reply in replies] == [alone(llama, ids) for ids in asked]
    assert [reply.cached_tokens for reply in replies] == [0, 0, 0, 16, 24, 24, 0]
    assert passes == 7
    assert sum(rows) == 29 + 30 + 30 + 9 + 13 + 6 + 6 + 7 * 5


@pytest.mark.parametrize("common", [0, 15], ids=["nothing", "less than two blocks"])
def test_texts_with_little_in_common_start_together(llama: Any, store: PrefixStore, common: int) -> None:
    replies, _, passes = run(llama, store, [prompt(common) + prompt(20, 2 + number) for number in range(3)])
    assert [reply.cached_tokens for reply in replies] == [0, 0, 0]
    assert passes == 6


def test_what_is_stored_is_waited_for_no_more(llama: Any, store: PrefixStore) -> None:
    run(llama, store, alike(1))
    replies, _, passes = run(llama, store, alike(4)[1:])
    assert [reply.cached_tokens for reply in replies] == [16, 16, 16]
    assert passes == 6


def test_a_longer_beginning_is_waited_for_again(llama: Any, store: PrefixStore) -> None:
    asked = [prompt(18) + prompt(4, 2), *[prompt(18) + prompt(22, 3) + prompt(4, 5 + number) for number in range(2)]]
    replies, _, passes = run(llama, store, asked)
    assert [reply.cached_tokens for reply in replies] == [0, 16, 40]
    assert [reply.tokens for reply in replies] == [alone(llama, ids) for ids in asked]
    assert passes == 8


@pytest.mark.parametrize("kind", ["cancelled", "failed"])
def test_another_text_takes_the_place_of_one_that_is_lost(llama: Any, store: PrefixStore, kind: str) -> None:
    asked = alike(4)
    expected = [alone(llama, ids) for ids in asked]
    hit: list[bool] = []

    def lose(*_: object) -> None:
        if hit:
            return
        hit.append(True)
        if kind == "failed":
            raise RuntimeError("broken")
        answers.tickets[0].cancel()

    with Session(llama, prefix_store=store) as session:
        llama.model.layers[1].mlp.register_forward_pre_hook(lose)
        llama.rows.clear()
        answers = Answers(session, asked)
        found = answers.wait()
    assert hit
    if kind == "failed":
        assert "broken" in str(found[0])
    else:
        assert found[0].finish_reason == "cancelled"
    assert [found[index].tokens for index in (1, 2, 3)] == expected[1:]
    assert [found[index].cached_tokens for index in (1, 2, 3)] == [0, 16, 16]


def test_texts_that_always_fail_keep_no_other_waiting_for_long(llama: Any, store: PrefixStore) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    with Session(llama, prefix_store=store) as session:
        llama.model.layers[1].mlp.register_forward_pre_hook(fail)
        before = llama.profile.passes
        found = Answers(session, alike(8)).wait()
    assert all("broken" in str(event) for event in found.values())
    assert llama.profile.passes - before <= 4


@pytest.mark.parametrize("most", [6, 1], ids=["long answers", "answers of a token"])
@pytest.mark.parametrize("kind", ["full disk", "small queue", "repeated only", "nothing kept"])
def test_what_the_store_did_not_take_is_copied_all_the_same(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, most: int
) -> None:
    """Also from a text that has ended: its memory stays until the others have begun."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    if kind == "full disk":
        monkeypatch.setattr(StoreFolder, "store", refuse)
    options: dict[str, Any] = {"small queue": {"queue_bytes": 1}, "repeated only": {"repeated_only": True}}.get(kind, {})
    folder = None if kind == "nothing kept" else tmp_path / "store"
    asked = alike(4)
    with PrefixStore(folder, 10**8, block_tokens=BLOCK, **options) as store:
        replies, rows, passes = run(llama, store, asked, max_new_tokens=most)
    assert [reply.tokens for reply in replies] == [alone(llama, ids, most) for ids in asked]
    assert [reply.cached_tokens for reply in replies] == [0, 16, 16, 16]
    assert sum(rows) == 29 + 3 * 13 + 4 * (most - 1)
    assert passes == most + 1


def test_one_of_a_batch_stores_what_others_have_too(llama: Any, tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "store", 10**8, block_tokens=BLOCK, repeated_only=True) as store:
        run(llama, store, alike(3))
        assert store.flush(20)
        assert [model.blocks for model in store.models()] == [2]


def test_lines_of_a_batch_share_and_their_answers_stay(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the store of `rabbit batch`, which writes what a second line has: empty, and filled by the first run."""
    lines = [{"custom_id": f"{number}", "prompt": ids, "max_tokens": 1} for number, ids in enumerate(alike(5))]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    admit = Engine._admit

    def admit_all(engine: Engine) -> None:
        while not llama.rows and engine.waiting < len(lines):
            time.sleep(0.01)
        admit(engine)

    monkeypatch.setattr(Engine, "_admit", admit_all)
    found: list[dict[str, Any]] = []
    cached: list[int] = []
    with PrefixStore(tmp_path / "store", 10**8, block_tokens=BLOCK, repeated_only=True) as store:
        for name in ("empty", "filled"):
            llama.rows.clear()
            with BatchJob("tiny", tmp_path / "in.jsonl", tmp_path / name, Choices(task="complete"), {}) as job:
                assert job.run(llama, prefix_store=store).failed == 0
            assert store.flush(20)
            answers = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
            bodies = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
            found.append({key: body["choices"] for key, body in bodies.items()})
            details = [body["usage"].get("prompt_tokens_details", {"cached_tokens": 0}) for body in bodies.values()]
            cached.append(sum(each["cached_tokens"] for each in details))
    assert cached == [4 * 16, 5 * 16]
    assert found[0] == found[1]


def test_a_request_that_comes_during_the_pass_copies_what_it_computed(llama: Any) -> None:
    asked = alike(2)
    with PrefixStore(None, 0, block_tokens=BLOCK) as store, Session(llama, prefix_store=store) as session:
        others: list[Answers] = []

        def come(*_: object) -> None:
            if not others:
                others.append(Answers(session, asked[1:]))

        llama.model.layers[1].mlp.register_forward_pre_hook(come)
        first = Answers(session, asked[:1]).wait()[0]
        second = others[0].wait()[0]
    assert [reply.tokens for reply in (first, second)] == [alone(llama, ids) for ids in asked]
    assert [reply.cached_tokens for reply in (first, second)] == [0, 16]


def test_texts_that_wait_for_another_count_as_started_when_a_wait_is_estimated(llama: Any, store: PrefixStore) -> None:
    found: list[float] = []
    with Session(llama, prefix_store=store, max_requests=4) as session:
        llama.model.layers[1].mlp.register_forward_pre_hook(lambda *_: found.append(session._engine._passes_until_start()))
        Answers(session, alike(3)).wait()
        assert found[0] == 0
        found.clear()
        Answers(session, alike(4, seed=2)).wait()
        assert found[0] > 0


def caches() -> int:
    gc.collect()
    return sum(type(one) is DynamicCache for one in gc.get_objects())


def test_nothing_is_kept_for_a_text_that_was_cancelled_while_it_waited(llama: Any, tmp_path: Path) -> None:
    with PrefixStore(None, 0, block_tokens=BLOCK) as store, Session(llama, prefix_store=store) as session:
        hit: list[bool] = []

        def cancel(*_: object) -> None:
            if not hit:
                hit.append(True)
                answers.tickets[1].cancel()

        llama.model.layers[1].mlp.register_forward_pre_hook(cancel)
        answers = Answers(session, alike(2), max_new_tokens=1)
        found = answers.wait()
        assert [found[0].finish_reason, found[1].finish_reason] == ["length", "cancelled"]
        assert session._prefixes is not None
        assert session._prefixes._under_way == set()
        assert caches() == 0
        assert answers.tickets  # which keep no cache


def test_memory_for_others_gives_way(llama: Any) -> None:
    """Room for one text at a time: those that wait compute what they would have copied, and nobody waits forever."""
    asked = alike(3)
    with PrefixStore(None, 0, block_tokens=BLOCK) as store, Session(llama, prefix_store=store) as session:
        kept: list[int] = []
        room, engine = session._room, session._engine
        job_bytes = room.need([session._demand(session.request_text(asked[0], max_new_tokens=1).prompt)])
        engine._room = replace(room, nbytes=2 * job_bytes)
        taken = engine._take

        def shrink(job: Any) -> bool:
            took = taken(job)
            if not took:  # it waits
                engine._room = replace(room, nbytes=job_bytes)
            return took

        engine._take = shrink
        engine._give_up_kept, give_up = lambda: (kept.append(len(engine._kept)), give_up()), engine._give_up_kept
        replies = session.generate(asked, max_new_tokens=1, ignore_eos=True)
    assert [reply.tokens for reply in replies] == [alone(llama, ids, 1) for ids in asked]
    assert 1 in kept
    assert [reply.cached_tokens for reply in replies] == [0, 0, 0]


@pytest.mark.parametrize("length", [32, 40], ids=["fits", "longer"])
def test_texts_wait_only_for_what_fits_in_a_window(
    own_checkpoint: Any, load: Any, store: PrefixStore, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(known_prefixes, "_LEAST_BLOCKS", 4)
    model = load(own_checkpoint("mistral", sliding_window=4 * BLOCK + 1))
    asked = [prompt(18) + prompt(length - 18, 2 + number) for number in range(3)]
    replies, _, passes = run(model, store, asked)
    assert [reply.cached_tokens for reply in replies] == ([0, 16, 16] if length == 32 else [0, 0, 0])
    assert [reply.tokens for reply in replies] == [alone(model, ids) for ids in asked]
    assert passes == (7 if length == 32 else 6)


def test_caches_in_tiers_are_copied(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = alike(3, common=45)
    expected = [alone(llama, ids) for ids in asked]
    made: list[Any] = []

    def in_tiers(runtime: Any, demand: Any) -> Any:
        layers = runtime.partition.probe.growing_layers
        made.append(tiered_caches.make_cache(runtime, replace(demand, tiered=layers)))
        return made[-1]

    monkeypatch.setattr(texts, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(tiered_caches, "BlockHome", partial(BlockHome, block_tokens=BLOCK))
    monkeypatch.setattr("rabbit_engine.sessions.generation.make_cache", in_tiers)
    with PrefixStore(None, 0, block_tokens=BLOCK) as store:
        replies, *_ = run(llama, store, asked)
    assert [reply.cached_tokens for reply in replies] == [0, 40, 40]
    assert [reply.tokens for reply in replies] == expected
    for cache in made:
        cache.text.close()
