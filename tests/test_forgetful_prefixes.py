"""A prefix store for models whose layers forget: windows, and states that each token changes as a whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_known_prefixes import ASKED, BLOCK, alone, load, prompt
from tiny import words

from rabbit_engine import Lookup, PrefixStore, Session
from rabbit_engine.config import Cut
from rabbit_engine.model import tiered_caches
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning import texts
from rabbit_engine.sessions import known_prefixes
from rabbit_engine.sessions.forgetful import choose_ends
from rabbit_engine.streaming import BlockHome

__all__ = ["load"]

WINDOWS = {"gemma2": 8, "gemma3": 8, "mistral": 19, "ministral": 12, "gpt_oss": 9, "cohere2": 4}
"""Of a block, of parts of several, of less."""
STATES = ["qwen3_next", "qwen3_5", "mamba2", "bamba", "falcon_h1", "lfm2"]
SOME = ["gemma3", "mistral", "qwen3_5", "mamba2", "falcon_h1", "lfm2"]
PROBABLE = ASKED | {"logprobs": 3}


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Any]:
    """Open the same store, as another process would."""
    stores: list[PrefixStore] = []

    def opened(**keywords: Any) -> PrefixStore:
        stores.append(PrefixStore(tmp_path / "prefixes", 10**8, block_tokens=BLOCK, **keywords))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Any) -> PrefixStore:
    return open_store()  # type: ignore[no-any-return]


@pytest.fixture
def forgetful(own_checkpoint: Any, checkpoint: Any, load: Any) -> Any:
    """Load a family in the smallest budget whose ring holds a layer, with a small window."""

    def loaded(family: str, **keywords: Any) -> Any:
        if family in WINDOWS:
            return load(own_checkpoint(family, sliding_window=WINDOWS[family]), **keywords)
        return load(checkpoint(family), **keywords)

    return loaded


def ask(session: Session, store: PrefixStore, *prompts: list[int], **options: Any) -> list[Any]:
    """The answers, one after another, each stored before the next."""
    replies = []
    for ids in prompts:
        replies.append(session.generate([ids], **(PROBABLE | options))[0])
        assert store.flush(30)
    return replies


def cached(replies: list[Any]) -> list[int]:
    return [reply.cached_tokens for reply in replies]


def assert_alike(model: Any, found: list[Any], expected: list[Any]) -> None:
    """Bit for bit; by rounding where experts are read on demand, whose prompts are not computed in parts of a block."""
    assert [reply.tokens for reply in found] == [reply.tokens for reply in expected]
    if model.plan.experts.layers:
        for reply, other in zip(found, expected, strict=True):
            for token, same in zip(reply.logprobs, other.logprobs, strict=True):
                assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
    else:
        assert [reply.logprobs for reply in found] == [reply.logprobs for reply in expected]


@pytest.mark.parametrize("family", [*WINDOWS, *STATES])
def test_the_next_turn_begins_where_the_last_prompt_ended(forgetful: Any, open_store: Any, family: str) -> None:
    model, store = forgetful(family), open_store()
    first = prompt(37)
    with Session(model, prefix_store=store) as session:
        cold = ask(session, store, first)
        second = [*first, *cold[0].tokens, *prompt(17, 2)]
        store.clear()
        cold += ask(session, store, second)
        store.clear()
        warm = ask(session, store, first, first, second)
    with Session(model, prefix_store=open_store()) as session:
        warm += ask(session, store, second)
    assert cached(warm) == [0, 32, 32, 56]
    assert [reply.tokens for reply in cold] == [alone(model, ids) for ids in (first, second)]
    assert_alike(model, warm, [cold[0], cold[0], cold[1], cold[1]])


@pytest.mark.parametrize("family", SOME)
def test_where_texts_part_is_kept_when_it_is_seen(forgetful: Any, store: PrefixStore, family: str) -> None:
    """The second text that begins alike finds what was kept at a guess, the third where they part."""
    model = forgetful(family)
    same = prompt(50)
    prompts = [same + prompt(40, seed) for seed in (2, 3, 4)]
    with Session(model, prefix_store=store) as session:
        cold = []
        for ids in prompts:
            store.clear()
            cold += ask(session, store, ids)
        store.clear()
        warm = ask(session, store, *prompts)
    assert cached(warm) == [0, 32, 48]
    assert_alike(model, warm, cold)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "mamba2"])
def test_a_damaged_block_is_dropped_and_computed_again(forgetful: Any, open_store: Any, tmp_path: Path, family: str) -> None:
    model, ids = forgetful(family), prompt(41)
    store = open_store()
    with Session(model, prefix_store=store) as session:
        expected = ask(session, store, ids)
    files = sorted((tmp_path / "prefixes").rglob("*.safetensors"))
    assert len(files) == 5
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    for file in reversed(files):  # what is kept at the end of the last is read; at that of another only if it is missing
        data = bytearray(file.read_bytes())
        data[-3] ^= 4  # in the last tensor
        file.write_bytes(data)
        for tokens in (range(41 if file != files[-1] else 40), [40]):
            other = open_store()
            with Session(model, prefix_store=other) as session:
                found = ask(session, other, ids)
            assert_alike(model, found, expected)
            assert found[0].cached_tokens in tokens
    (listed,) = open_store().models()
    assert (listed.blocks, listed.tokens) == (5, 40)
    assert listed.nbytes == sum(file.stat().st_size for file in (tmp_path / "prefixes").rglob("*.safetensors"))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral", "ministral"])
def test_texts_that_fit_in_a_window_and_longer_ones_share_blocks(
    own_checkpoint: Any, load: Any, store: PrefixStore, family: str
) -> None:
    """Short ones keep the keys of all blocks, and find nothing where longer ones kept none."""
    model = load(own_checkpoint(family, sliding_window=4 * BLOCK + 1))
    same = prompt(30)
    short, long, other = same + prompt(2, 2), same + prompt(45, 3), same[:20] + prompt(6, 4)
    with Session(model, prefix_store=store) as session:
        cold = []
        for ids in (short, long, other):
            store.clear()
            cold += ask(session, store, ids)
        store.clear()
        expected = [cold[index] for index in (1, 2, 0, 1, 2)]
        warm = ask(session, store, long, other, short, long, other)
        assert_alike(model, warm, expected)
        assert cached(warm) == [0, 16, 24, 72, 24]


@pytest.mark.parametrize("family", ["mistral", "qwen3_5", "bamba"])
@pytest.mark.parametrize("speculate", [None, Lookup(nodes=8)], ids=["plain", "speculated"])
def test_drawn_answers_and_speculation_are_those_without_the_store(
    forgetful: Any, store: PrefixStore, family: str, speculate: Any
) -> None:
    model, ids = forgetful(family), prompt(20) + prompt(20)
    with Session(model, prefix_store=store, speculate=speculate) as session:
        asked: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.8, "seed": 4}
        cold, warm = ask(session, store, ids, ids, **asked)
    assert warm.cached_tokens == 32
    assert warm.tokens == cold.tokens
    if speculate is None:
        assert_alike(model, [warm], [cold])


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "falcon_h1"])
def test_layers_that_keep_all_may_be_in_tiers(
    forgetful: Any, store: PrefixStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model, made = forgetful(family), []
    first = prompt(57)
    second = first + prompt(12, 2)
    with Session(model, prefix_store=store) as session:
        expected = ask(session, store, first, second)
    layers = runtime_of(model).partition.probe.growing_layers

    def in_tiers(runtime: Any, demand: Any) -> Any:
        made.append(tiered_caches.make_cache(runtime, replace(demand, tiered=layers)))
        return made[-1]

    monkeypatch.setattr(texts, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(tiered_caches, "BlockHome", partial(BlockHome, block_tokens=BLOCK))
    monkeypatch.setattr("rabbit_engine.sessions.generation.make_cache", in_tiers)
    with Session(model, prefix_store=store) as session:
        warm = ask(session, store, first, second)
        store.clear()
        cold = ask(session, store, first, second)
    assert (cached(warm), cached(cold)) == ([56, 64], [0, 56])
    assert [reply.tokens for reply in (*warm, *cold)] == [reply.tokens for reply in expected] * 2
    assert_alike(model, warm[1:], cold[1:])
    for cache in made:
        if cache is not None:
            cache.text.close()


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_a_fork_begins_with_what_is_stored(forgetful: Any, store: PrefixStore, family: str) -> None:
    model, ids = forgetful(family), prompt(45)
    with Session(model, prefix_store=store) as session:
        cold = ask(session, store, ids + prompt(6, 2))
        store.clear()
        with session.fork(ids) as fork:
            replies = fork.generate([prompt(6, 2)], **ASKED)
        assert store.flush(30)
        with session.fork(ids) as fork:
            replies += fork.generate([prompt(6, 2)], **ASKED)
        after = ask(session, store, ids + prompt(6, 2))
    assert after[0].cached_tokens == 40
    assert [reply.tokens for reply in (*replies, *after)] == [cold[0].tokens] * 3


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "mamba2"])
def test_copies_take_limited_memory_and_the_last_end_is_given_up_last(
    forgetful: Any, store: PrefixStore, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model, ids = forgetful(family), prompt(69)
    found = []
    with Session(model, prefix_store=store) as session:
        for copies in (1 << 30, 0):
            monkeypatch.setattr(known_prefixes, "_COPIES_BYTES", copies)
            store.clear()
            found.append(cached(ask(session, store, ids, ids, ids[:33] + prompt(20, 2))))
            watching = session._prefixes._watching  # type: ignore[union-attr]
            assert all(each.nbytes == 0 for each in watching)
        monkeypatch.setattr(known_prefixes, "_COPIES_BYTES", largest_end(model, store, session, ids))
        store.clear()
        found.append(cached(ask(session, store, ids, ids, ids[:33] + prompt(20, 2))))
    assert found == [[0, 64, 32], [0, 0, 0], [0, 64, 0]]


def largest_end(model: Any, store: PrefixStore, session: Session, ids: list[int]) -> int:
    """The bytes of what is kept at one end."""
    from rabbit_engine.sessions.known_prefixes import KnownPrefixes

    most = 0

    def over(self: KnownPrefixes) -> bool:
        nonlocal most
        most = max(most, sum(each.nbytes for each in self._watching))
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KnownPrefixes, "_copies_are_over", over)
        patch.setattr(known_prefixes, "choose_ends", lambda *_, **__: [8])
        store.clear()
        ask(session, store, ids)
    return most


@pytest.mark.parametrize("family", ["qwen3_5", "mistral"])
def test_a_batch_keeps_where_lines_part(forgetful: Any, tmp_path: Path, family: str) -> None:
    model = forgetful(family)
    lines = [[*prompt(45), *[10 + number] * 20] for number in range(3)]
    with (
        PrefixStore(tmp_path / "store", 10**9, block_tokens=BLOCK, repeated_only=True) as store,
        Session(model, prefix_store=store) as session,
    ):
        assert cached(ask(session, store, *lines)) == [0, 0, 40]
        assert [model.blocks for model in store.models()] == [5]


def test_a_store_in_memory_alone(forgetful: Any) -> None:
    model, ids = forgetful("qwen3_5"), prompt(41)
    with PrefixStore(None, 0, 10**8, block_tokens=BLOCK) as store, Session(model, prefix_store=store) as session:
        found = ask(session, store, ids, ids, ids + prompt(9, 2))
    assert cached(found) == [0, 40, 40]
    assert_alike(model, found[:1], found[1:2])


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_without_a_ring_for_a_layer_nothing_is_stored_and_the_log_says_why(
    checkpoint: Any, streamed: Any, store: PrefixStore, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = streamed(checkpoint(family), cut=Cut(least_bytes=1, rest_share=0.0))
    model.tokenizer = words(96)
    caplog.set_level(logging.WARNING, "rabbit_engine")
    with Session(model, prefix_store=store) as session:
        assert cached(ask(session, store, prompt(41), prompt(41))) == [0, 0]
    assert store.models() == []
    assert "load it with a larger max_seq_len" in caplog.text


def test_experts_on_demand_are_read_once_more_for_a_prompt(forgetful: Any, store: PrefixStore) -> None:
    model = forgetful("qwen3_next")
    assert model.plan.experts.layers
    before = model.profile.passes
    with Session(model, prefix_store=store) as session:
        ask(session, store, prompt(41), max_new_tokens=1)
        assert model.profile.passes - before == 1
        assert cached(ask(session, store, prompt(41), prompt(41)[:30] + prompt(9, 2))) == [40, 0]


def test_ends_are_the_last_the_one_that_was_left_and_doublings() -> None:
    assert choose_ends(0, 0, 3) == [3]
    assert choose_ends(0, 0, 40) == [40, 32, 16, 8, 4]
    assert choose_ends(8, 21, 40) == [40, 21, 32, 16]
    assert choose_ends(32, 32, 40) == [40]
    assert choose_ends(0, 21, 40, few=True) == [40, 21]
    assert choose_ends(0, 7, 0) == []
    assert choose_ends(5, 9, 5) == []
