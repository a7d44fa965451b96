"""Sessions with a prefix store: beginnings seen before are read, and answers are the same with and without them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import words

from rabbit_engine import Lookup, PrefixStore, Session
from rabbit_engine.config import Cut
from rabbit_engine.model import tiered_caches
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning import texts
from rabbit_engine.sessions import known_prefixes
from rabbit_engine.sessions.known_prefixes import KnownText
from rabbit_engine.streaming import BlockHome

BLOCK = 8
ASKED: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    with PrefixStore(tmp_path / "prefixes", 10**8, block_tokens=BLOCK) as store:
        yield store


@pytest.fixture
def load(parted: Any) -> Any:
    """Load so that prompts may be computed in parts, with a tokenizer."""

    def loaded(folder: Any, **keywords: Any) -> Any:
        model = parted(folder, **keywords)
        model.tokenizer = words(96)
        return model

    return loaded


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return [int(token) for token in torch.randint(5, 90, (tokens,), generator=torch.Generator().manual_seed(seed))]


def alone(model: Any, ids: list[int]) -> tuple[int, ...]:
    found = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0, prefill_chunk_size=BLOCK)
    return tuple(found[0, len(ids) :].tolist())


FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "phi3", "glm4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_beginning_seen_before_is_read_and_the_answer_stays(
    checkpoint: Any, load: Any, store: PrefixStore, family: str
) -> None:
    model = load(checkpoint(family))
    first = prompt(37)
    second = first[:30] + prompt(20, 2)
    expected = [alone(model, first), alone(model, second)]
    with Session(model, prefix_store=store) as session:
        new = session.generate([first], **ASKED)[0]
        assert store.flush(30)
        again, other = (session.generate([ids], **ASKED)[0] for ids in (first, second))
    assert [new.cached_tokens, again.cached_tokens, other.cached_tokens] == [0, 32, 24]
    assert [new.tokens, again.tokens, other.tokens] == [expected[0], expected[0], expected[1]]


def test_answers_are_bit_equal_with_and_without_the_store(checkpoint: Any, load: Any, store: PrefixStore) -> None:
    """Probabilities too: a block has the same bits whichever text computed it."""
    model = load(checkpoint("llama"))
    first = prompt(70)
    texts = [first[:33], first, first[:50] + prompt(9, 3), first[:16]]
    asked = ASKED | {"logprobs": 3}
    with Session(model, prefix_store=store) as session:
        cold = []
        for ids in texts:
            store.clear()
            cold.append(session.generate([ids], **asked)[0])
            assert store.flush(30)
        assert not any(reply.cached_tokens for reply in cold)
        session.generate([first], **asked)
        assert store.flush(30)
        warm = session.generate(texts, **asked)
    assert [reply.cached_tokens for reply in warm] == [32, 64, 48, 8]
    assert [reply.logprobs for reply in warm] == [reply.logprobs for reply in cold]


def test_another_session_and_a_damaged_block(checkpoint: Any, load: Any, store: PrefixStore, tmp_path: Path) -> None:
    model, ids = load(checkpoint("llama")), prompt(41)

    def again() -> PrefixStore:
        return PrefixStore(tmp_path / "prefixes", 10**8, block_tokens=BLOCK)

    with Session(model, prefix_store=store) as session:
        expected = session.generate([ids], **ASKED)[0].tokens
    assert store.flush(30)
    files = sorted((tmp_path / "prefixes").rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        data = bytearray(file.read_bytes())
        data[-3] ^= 4  # in the last tensor
        file.write_bytes(data)
        with (
            PrefixStore(tmp_path / "prefixes", 10**8, block_tokens=BLOCK) as other,
            Session(model, prefix_store=other) as session,
        ):
            reply = session.generate([ids], **ASKED)[0]
            assert reply.tokens == expected
            assert reply.cached_tokens < 40
            assert other.flush(30)
        with (
            PrefixStore(tmp_path / "prefixes", 10**8, block_tokens=BLOCK) as other,
            Session(model, prefix_store=other) as session,
        ):
            assert session.generate([ids], **ASKED)[0].cached_tokens == 40


@pytest.mark.parametrize("speculate", [None, Lookup(nodes=8)], ids=["plain", "speculated"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_drawn_answers_and_speculation_are_those_without_the_store(
    own_checkpoint: Any, load: Any, store: PrefixStore, family: str, speculate: Any
) -> None:
    model = load(own_checkpoint(family, **({"sliding_window": 8 * BLOCK + 1} if family == "mistral" else {})))
    texts = [prompt(20) + prompt(20), prompt(20) + prompt(30, 5)]
    asked: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True, "temperature": 0.8, "seed": 4}
    found = []
    with Session(model, prefix_store=store, speculate=speculate) as session:
        for _ in range(2):
            found.append(session.generate(texts, **asked))
            assert store.flush(30)
    assert [[reply.tokens for reply in replies] for replies in found[:1]] * 2 == [
        [reply.tokens for reply in each] for each in found
    ]
    assert all(reply.cached_tokens for reply in found[1])


@pytest.mark.parametrize("family", ["mamba", "jamba", "llama4"])
@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_classes_that_do_not_continue_what_a_cache_holds_store_nothing_and_say_so(
    checkpoint: Any, streamed: Any, tmp_path: Path, family: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = streamed(checkpoint(family))
    model.tokenizer = words(96)
    caplog.set_level(logging.INFO, "rabbit_engine")
    with (
        PrefixStore(tmp_path / "prefixes", 10**8, block_tokens=BLOCK, log_level=level) as store,
        Session(model, prefix_store=store) as session,
    ):
        assert [session.generate([prompt(30)], **ASKED)[0].cached_tokens for _ in range(2)] == [0, 0]
    assert [record.levelno for record in caplog.records if "prompts are not stored: " in record.getMessage()] == [level]
    assert not (tmp_path / "prefixes").exists()


def test_without_a_ring_for_a_layer_prompts_are_computed_whole_and_stored(
    checkpoint: Any, streamed: Any, store: PrefixStore
) -> None:
    model = streamed(checkpoint("llama"), cut=Cut(least_bytes=1, rest_share=0.0))
    model.tokenizer = words(96)
    ids = prompt(41)
    plain = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    with Session(model, prefix_store=store) as session:
        replies = []
        for _ in range(2):
            replies += session.generate([ids], **ASKED)
            assert store.flush(30)
    assert [reply.tokens for reply in replies] == [tuple(plain[0, 41:].tolist())] * 2
    assert replies[1].cached_tokens == 40


def test_another_model_never_finds_them(checkpoint: Any, own_checkpoint: Any, load: Any, store: PrefixStore) -> None:
    ids = prompt(41)
    for folder in (checkpoint("llama"), own_checkpoint("llama", initializer_range=0.3)):
        with Session(load(folder), prefix_store=store) as session:
            assert session.generate([ids], **ASKED)[0].cached_tokens == 0
            assert store.flush(30)
    with Session(load(checkpoint("llama"), attn_implementation="eager"), prefix_store=store) as session:
        assert session.generate([ids], **ASKED)[0].cached_tokens == 0
    assert store.flush(30)
    assert len(store.models()) == 3


def test_an_adapter_computes_other_states(checkpoint: Any, load: Any, store: PrefixStore, adapter: Path) -> None:
    model, ids = load(checkpoint("llama")), prompt(41)
    with Session(model, prefix_store=store) as session:
        session.generate([ids], **ASKED)
        assert store.flush(30)
        model.load_adapter(str(adapter))
        found = session.generate([ids], **ASKED)[0]
    assert found.cached_tokens == 0
    assert found.tokens == alone(model, ids)


def test_peft_around_the_model_computes_other_states(checkpoint: Any, load: Any, store: PrefixStore) -> None:
    """PEFT puts an adapter's layers into the model that it wraps, also while a session runs."""
    peft = pytest.importorskip("peft")
    model, ids = load(checkpoint("llama")), prompt(41)
    with Session(model, prefix_store=store) as session:
        session.generate([ids], **ASKED)
        assert store.flush(30)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, 0.0, 0.5)
        found = session.generate([ids], **ASKED)[0]
        assert found.cached_tokens == 0
        assert found.tokens == alone(model, ids)
    store.clear()
    with Session(model, prefix_store=store) as session:
        session.generate([ids], **ASKED)
        assert store.flush(30)
    assert store.models() == []


def test_a_session_that_computes_otherwise_than_it_began_finds_nothing(
    checkpoint: Any, load: Any, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = load(checkpoint("llama")), prompt(41)
    with Session(model, prefix_store=store) as session:

        def cached() -> int:
            return session.generate([ids], **ASKED)[0].cached_tokens

        assert cached() == 0
        assert store.flush(30)
        model.set_attn_implementation("eager")
        assert cached() == 0
        model.set_attn_implementation("sdpa")
        assert cached() == 40
        for name, value in (("use_cache", False), ("cache_implementation", "static")):
            with monkeypatch.context() as patch:
                patch.setattr(model.generation_config, name, value)
                found = session.generate([ids], **ASKED)[0]
                assert found.cached_tokens == 0
                expected = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)
                assert found.tokens == tuple(expected[0, 41:].tolist())


def test_a_session_of_a_batch_writes_the_common_beginning_alone(checkpoint: Any, load: Any, tmp_path: Path) -> None:
    model = load(checkpoint("llama"))
    texts = [[*prompt(17), *[10 + number] * 20] for number in range(3)]
    with (
        PrefixStore(tmp_path / "store", 10**9, block_tokens=BLOCK, repeated_only=True) as store,
        Session(model, prefix_store=store) as session,
    ):
        cached = []
        for text in texts:
            cached.append(session.generate([text], **ASKED)[0].cached_tokens)
            assert store.flush(20)
        assert cached == [0, 0, 16]
        assert [model.blocks for model in store.models()] == [2]


def test_blocks_that_the_queue_has_no_room_for_are_offered_again(
    checkpoint: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, keep = load(checkpoint("llama")), KnownText.keep
    config = model.config
    block_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * BLOCK * config.head_dim * 4
    monkeypatch.setattr(known_prefixes, "_RETRY_S", 0.0)
    monkeypatch.setattr(KnownText, "keep", lambda self: (store.flush(20), keep(self)))
    with (
        PrefixStore(tmp_path / "store", 10**8, block_tokens=BLOCK, queue_bytes=block_bytes) as store,
        Session(model, prefix_store=store) as session,
    ):
        session.generate([prompt(33)], max_new_tokens=2, ignore_eos=True)
        assert store.flush(20)
        assert [model.blocks for model in store.models()] == [2]
        assert session.generate([prompt(33)], **ASKED)[0].cached_tokens == 16
        assert store.flush(20)
        assert [model.blocks for model in store.models()] == [4]


@pytest.mark.parametrize("block_tokens", [4, BLOCK, 24])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_caches_in_tiers_are_stored_and_read(
    checkpoint: Any,
    load: Any,
    store: PrefixStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    block_tokens: int,
) -> None:
    model = load(checkpoint(family))
    first = prompt(57)
    second = first[:45] + prompt(12, 2)
    expected = [alone(model, first), alone(model, second)]
    made: list[Any] = []
    layers = runtime_of(model).partition.probe.growing_layers

    def in_tiers(runtime: Any, demand: Any) -> Any:
        made.append(tiered_caches.make_cache(runtime, replace(demand, tiered=layers)))
        return made[-1]

    monkeypatch.setattr(texts, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(tiered_caches, "BlockHome", partial(BlockHome, block_tokens=block_tokens))
    monkeypatch.setattr("rabbit_engine.sessions.generation.make_cache", in_tiers)
    with Session(model, prefix_store=store) as session:
        new = session.generate([first], **ASKED)[0]
        assert store.flush(30)
        again, other = (session.generate([ids], **ASKED)[0] for ids in (first, second))
    assert [new.cached_tokens, again.cached_tokens, other.cached_tokens] == [0, 56, 40]
    assert [new.tokens, again.tokens, other.tokens] == [expected[0], expected[0], expected[1]]
    assert all(cache.text.bytes_written for cache in made)
    assert len(made) == 3
    for cache in made:
        cache.text.close()
