"""Sessions that continue the text that ended last: what is computed, what is left in memory, and what `generate` gives for it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import words
from transformers import DynamicCache

from rabbit_engine import Lookup, PrefixStore, Session
from rabbit_engine.model import tiered_caches
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.sessions import last_text
from rabbit_engine.sessions.answer import Reply
from rabbit_engine.sessions.last_text import LastText
from rabbit_engine.sessions.room import Room
from rabbit_engine.transformers_bridge.forwards import cache_argument

BLOCK = 8
ASKED: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": 2}


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_text, "LEAST_TOKENS", 4)


@pytest.fixture
def load(parted: Any) -> Any:
    """Load so that prompts may be computed in parts, with a tokenizer."""

    def loaded(folder: Any, **keywords: Any) -> Any:
        model = parted(folder, **({"max_seq_len": 96} | keywords))
        model.tokenizer = words(96)
        return model

    return loaded


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    with PrefixStore(tmp_path / "prefixes", 10**8, block_tokens=BLOCK) as store:
        yield store


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return [int(token) for token in torch.randint(5, 90, (tokens,), generator=torch.Generator().manual_seed(seed))]


def ask(session: Session, ids: Sequence[int], **options: Any) -> Reply:
    return session.generate([list(ids)], **(ASKED | options))[0]


def continued(model: Any, prompts: Sequence[list[int]], common: Sequence[int]) -> list[tuple[int, ...]]:
    """The answers of `generate` to prompts of which each continues the cache of the one before, cut to so many tokens."""
    cache = DynamicCache(config=model.config)
    settings = {"do_sample": False, "pad_token_id": 0, **cache_argument(model.forward, cache)}
    answers = []
    for ids, tokens in zip(prompts, common, strict=True):
        if (dropped := cache.get_seq_length() - tokens) > 0:
            cache.crop(-dropped)
        found = model.generate(torch.tensor([ids]), max_new_tokens=6, **settings)
        answers.append(tuple(found[0, len(ids) :].tolist()))
    return answers


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3", "mistral"])
def test_the_next_turn_computes_what_is_new_as_generate_does_with_the_cache(checkpoint: Any, load: Any, family: str) -> None:
    model = load(checkpoint(family))
    with Session(model, continue_last=True) as session:
        prompts, replies = [prompt(20)], []
        for turn in range(3):
            replies.append(ask(session, prompts[-1]))
            prompts.append([*prompts[-1], *replies[-1].tokens, *prompt(4, turn + 2)])
    known = [0, 25, 35]
    assert [reply.cached_tokens for reply in replies] == known
    assert [reply.tokens for reply in replies] == continued(model, prompts[:3], known)


def test_an_edited_turn_continues_what_is_the_same(checkpoint: Any, load: Any) -> None:
    model = load(checkpoint("llama"))
    first = prompt(20)
    prompts = [first, [*first[:15], *prompt(9, 2)], first[:10], prompt(20, 5)]
    with Session(model, continue_last=True) as session:
        replies = [ask(session, ids) for ids in prompts]
    assert [reply.cached_tokens for reply in replies] == [0, 15, 9, 0]
    assert [reply.tokens for reply in replies] == continued(model, prompts, [0, 15, 9, 0])


@pytest.mark.parametrize(("family", "sizes"), [("mistral", {"sliding_window": 12}), ("qwen3_next", {})])
def test_layers_that_forget_are_continued_only_where_they_ended(
    own_checkpoint: Any, load: Any, family: str, sizes: dict[str, int]
) -> None:
    model = load(own_checkpoint(family, **sizes))
    first = prompt(20)
    with Session(model, continue_last=True) as session:
        reply = ask(session, first)
        longer = ask(session, second := [*first, *reply.tokens, 7])
        edited = ask(session, third := [*second[:-2], 9, 9, 9])
    assert [longer.cached_tokens, edited.cached_tokens] == [25, 0]
    assert [longer.tokens, edited.tokens] == continued(model, [first, second], [0, 25])[1:] + continued(model, [third], [0])


def test_other_work_frees_the_text(checkpoint: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, freed, drop = load(checkpoint("llama")), [], LastText.drop
    monkeypatch.setattr(LastText, "drop", lambda self: (freed.append(self._kept is not None), drop(self))[1])
    first = prompt(20)
    with Session(model, continue_last=True) as session:
        for work in (lambda: session.embed([first]), lambda: session.call([(lambda: 1, 1)])[0].result()):
            reply = ask(session, first)
            work()
            assert freed.pop()
            assert ask(session, [*first, *reply.tokens, 7]).cached_tokens == 0
        assert not freed
    assert freed == [True]  # with the session


def test_a_session_by_default_and_one_of_an_adapter_compute_all(checkpoint: Any, load: Any, adapter: Path) -> None:
    model, first = load(checkpoint("llama")), prompt(20)
    with Session(model) as session:
        reply = ask(session, first)
        assert ask(session, [*first, *reply.tokens, 7]).cached_tokens == 0
    with Session(model, continue_last=True) as session:
        reply = ask(session, first)
        model.set_attn_implementation("eager")
        assert ask(session, second := [*first, *reply.tokens, 7]).cached_tokens == 0
        model.load_adapter(str(adapter))
        for _ in range(2):
            assert ask(session, second).cached_tokens == 0


def test_an_interrupted_answer_is_continued(checkpoint: Any, load: Any) -> None:
    model, first, seen = load(checkpoint("llama")), prompt(20), threading.Event()
    with Session(model, continue_last=True) as session:
        found: list[Any] = []
        done = threading.Event()

        def tell(_: int, event: Any) -> None:
            found.append(event)
            if len(found) == 4:
                seen.set()
            if isinstance(event, Reply):
                done.set()

        ticket = session.ask([session.request_text(first, **(ASKED | {"max_new_tokens": 60}))], tell)[0]
        assert seen.wait(20)
        ticket.cancel()
        assert done.wait(20)
        tokens = found[-1].tokens
        reply = ask(session, second := [*first, *tokens, 7, 8])
    assert found[-1].finish_reason == "cancelled"
    known = len(first) + len(tokens) - 1
    assert reply.cached_tokens == known
    cache = DynamicCache(config=model.config)
    kept = {"do_sample": False, "pad_token_id": 0, **cache_argument(model.forward, cache)}
    model.generate(torch.tensor([first]), max_new_tokens=len(tokens), **kept)
    again = model.generate(torch.tensor([second]), max_new_tokens=6, **kept)
    assert reply.tokens == tuple(again[0, len(second) :].tolist())


@pytest.mark.parametrize("speculate", [None, Lookup(nodes=8)], ids=["plain", "speculated"])
def test_blocks_of_answers_are_stored_apart(checkpoint: Any, load: Any, store: PrefixStore, speculate: Any) -> None:
    """A later session reads them; one that computes whole prompts never does."""
    model, first = load(checkpoint("llama")), prompt(20)
    with Session(model, continue_last=True, prefix_store=store, speculate=speculate) as session:
        reply = ask(session, first)
        second = [*first, *reply.tokens, *prompt(9, 2)]
        longer = ask(session, second)
        assert longer.cached_tokens == 25
        assert store.flush(30)
    with Session(model, continue_last=True, prefix_store=store) as session:
        again = ask(session, second)
        assert again.cached_tokens == 32
        assert again.tokens == longer.tokens
        assert ask(session, [*first[:12], 3, 4]).cached_tokens == 12  # more than a block
    with Session(model, prefix_store=store) as session:
        assert ask(session, second).cached_tokens == 0


def test_a_new_text_is_computed_whole_as_without_a_store(checkpoint: Any, load: Any, store: PrefixStore) -> None:
    model, first = load(checkpoint("llama")), prompt(50)
    parts = []
    for continue_last in (True, False):
        with Session(model, continue_last=continue_last, prefix_store=store) as session:
            parts.append(session._demand(session.request_text(first).prompt).chunk)
            found = ask(session, first)
        if continue_last:
            with Session(model) as plain:
                assert found.logprobs == ask(plain, first).logprobs
    assert parts == [None, BLOCK]


def test_more_that_is_stored_wins(checkpoint: Any, load: Any, store: PrefixStore) -> None:
    model, first = load(checkpoint("llama")), prompt(50)
    with Session(model, continue_last=True, prefix_store=store) as session:
        whole = ask(session, first)
        assert store.flush(30)
        assert ask(session, [*first[:9], *prompt(20, 3)]).cached_tokens == 9
        again = ask(session, first)
    assert again.cached_tokens == 48
    assert again.tokens == whole.tokens


def test_a_text_in_tiers_is_continued_in_them(
    checkpoint: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, first, demand = load(checkpoint("llama")), prompt(30), Room.demand
    layers = runtime_of(model).partition.probe.growing_layers
    monkeypatch.setattr("rabbit_engine.planning.texts.cache_folder", lambda: tmp_path)
    in_tiers = [True, True, False]
    monkeypatch.setattr(Room, "demand", lambda self, *sizes: replace(demand(self, *sizes), tiered=layers * in_tiers[0]))
    with Session(model, continue_last=True) as session:
        reply = ask(session, first)
        second = [*first, *reply.tokens, 7]
        in_tiers.pop(0)
        longer = ask(session, second)
        in_tiers.pop(0)
        third = ask(session, [*second, *longer.tokens, 7])
    assert [longer.cached_tokens, third.cached_tokens] == [35, 0]
    assert longer.tokens == continued(model, [first, second], [0, 35])[1]


def test_what_cannot_be_cut_is_dropped(checkpoint: Any, load: Any) -> None:
    model = load(checkpoint("llama"))
    last, demand = LastText(model), tiered_caches.Demand(8, 8)
    cache = DynamicCache(config=model.config)
    for broken in (None, cache):
        last.put(prompt(9), broken, demand, is_whole=True)
        assert last.take([*prompt(9), 5], demand) is None
    for index in range(len(cache.layers)):
        cache.update(torch.zeros(1, 1, 8 if index else 7, 4), torch.zeros(1, 1, 8 if index else 7, 4), index)
    last.put(prompt(9), copy.deepcopy(cache), demand, is_whole=False)
    found = last.take([*prompt(9), 5], demand)
    assert found is not None
    assert [layer.get_seq_length() for layer in found[0].layers] == [7] * len(cache.layers)
    assert found[1] == 7


def test_states_are_dropped_with_a_pass_that_was_interrupted(checkpoint: Any, load: Any) -> None:
    """A state does not tell whether it has the token of that pass."""
    model, demand, ids = load(checkpoint("qwen3_next")), tiered_caches.Demand(8, 8), prompt(9)
    last, cache = LastText(model), DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([ids[:8]]), **cache_argument(model.forward, cache))
    for is_whole in (True, False):
        last.put(ids, cache, demand, is_whole=is_whole)
        assert (last.take([*ids, 5], demand) is not None) == is_whole
