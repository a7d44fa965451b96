"""Forks of a session: a prefix computed once, and texts that continue copies of its cache with the bits of transformers."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tiny import words
from transformers import DynamicCache
from waiting import wait_until

from rabbit_engine import Session, errors
from rabbit_engine.decoding.lookup import Lookup
from rabbit_engine.model import tiered_caches
from rabbit_engine.sessions import held
from rabbit_engine.streaming import BlockHome
from rabbit_engine.transformers_bridge.tiered import TieredCache

BLOCK = 4
FAMILIES = ["llama", "gemma3", "qwen3_next"]
ASKED: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return [int(token) for token in torch.randint(5, 90, (tokens,), generator=torch.Generator().manual_seed(seed))]


PREFIX = prompt(20) + prompt(20)
MORE = [prompt(7, 2), prompt(1, 3), [], prompt(20)]


@pytest.fixture
def load(checkpoint: Any, streamed: Any, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A streamed model with a tokenizer of words, and transformers' own; caches in small blocks."""
    monkeypatch.setattr(tiered_caches, "BlockHome", partial(BlockHome, block_tokens=BLOCK))

    def loaded(family: str) -> Any:
        deeper = family == "qwen3_next"
        folder = families.save(family, tmp_path / "model", num_hidden_layers=8) if deeper else checkpoint(family)
        model = streamed(folder)
        model.tokenizer = words(96)
        return model, plain(folder)

    return loaded


def alone(model: Any, seed: int | None = None) -> list[tuple[int, ...]]:
    """The continuations of transformers, each of a copy of the prefix's cache."""
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(torch.tensor([PREFIX[:-1]]), past_key_values=cache)
    found = []
    for more in MORE:
        ids = torch.tensor([PREFIX + more])
        torch.manual_seed(0 if seed is None else seed)
        drawn = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 0.8}
        tokens = model.generate(
            ids, past_key_values=copy.deepcopy(cache), max_new_tokens=8, eos_token_id=None, pad_token_id=0, **drawn
        )
        found.append(tuple(tokens[0, ids.shape[1] :].tolist()))
    return found


@pytest.mark.parametrize("speculate", [None, Lookup(nodes=8)], ids=["plain", "speculated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_have_the_bits_of_copies_of_the_prefixs_cache(load: Any, family: str, speculate: Any) -> None:
    model, own = load(family)
    likeliest, drawn = alone(own), alone(own, seed=4)
    with Session(model, speculate=speculate) as session, session.fork(PREFIX) as fork:
        for _ in range(2):
            replies = fork.generate(MORE, temperature=0, **ASKED)
            assert [reply.tokens for reply in replies] == likeliest
            assert [reply.tokens for reply in fork.generate(MORE, seed=4, temperature=0.8, **ASKED)] == drawn
        assert [reply.cached_tokens for reply in replies] == [39] * 4
        assert [reply.prompt_tokens for reply in replies] == [len(PREFIX + more) for more in MORE]
        assert fork.tokens == 39


def test_the_prefix_is_computed_once_and_continuations_share_passes(load: Any) -> None:
    model, _ = load("llama")
    with Session(model) as session:
        before = model.profile.passes
        with session.fork(PREFIX) as fork:
            wait_until(lambda: model.profile.passes - before == 1)  # a pass is counted after its last token is told
            fork.generate(MORE, temperature=0, **ASKED)
            wait_until(lambda: model.profile.passes - before == 1 + 8)


def test_a_prefix_past_the_positions_of_the_model_is_refused(load: Any) -> None:
    model, _ = load("llama")
    with Session(model) as session:
        most = session.most_tokens
        with pytest.raises(errors.PromptTooLongError, match=rf"a prefix of {most} tokens leaves no room .* the {most} that fit"):
            session.fork([5] * most)


def test_layers_that_stay_whole_are_shared_too(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with memory of its own."""
    monkeypatch.setattr(held, "in_shared_blocks", lambda _, demand: demand)
    model, own = load("gemma3")
    with Session(model, speculate=Lookup(nodes=8)) as session, session.fork(PREFIX) as fork:
        cache = fork._held.empty_cache
        assert type(cache) is DynamicCache
        begun, other = [fork._held.copy(60).layers for _ in range(2)]
        pairs = [(mine, its) for mine, its in zip(begun, other, strict=True) if mine.keys is its.keys]
        assert 0 < len(pairs) < len(begun)  # windows are copied
        assert [reply.tokens for reply in fork.generate(MORE, temperature=0, **ASKED)] == alone(own)
        assert [reply.tokens for reply in fork.generate(MORE, temperature=0, **ASKED)] == alone(own)


def test_blocks_are_shared_and_counted_once(load: Any) -> None:
    model, _ = load("llama")
    with Session(model) as session:
        room, whole = session._room, session.request_text(PREFIX + MORE[0], max_new_tokens=8)
        with session.fork(PREFIX) as fork:
            caches = [fork._held.copy(60) for _ in range(2)]
            assert all(isinstance(cache, TieredCache) for cache in caches)
            first, second = ([block.stored for block in cache.layers[0].states._blocks] for cache in caches)
            assert first == second
            assert len(first) == 39 // BLOCK - 1
            assert session._engine.held_bytes == fork.nbytes > 0
            demand = session._demand(whole.prompt, fork._held)
            assert demand.begun == 39
            again = session._demand(whole.prompt, fork._held)
            layer = room.probe.growing_token_bytes * room.probe.growing_layers
            assert room.need([replace(again, begun=0)]) - room.need([again]) >= 39 * layer
        assert session._engine.held_bytes == 0


def test_what_does_not_fit_beside_a_fork_is_told(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load("llama")
    with Session(model) as session, session.fork(PREFIX) as fork:
        need = session._room.need([session._room.demand(50, 8)])
        monkeypatch.setattr(fork._held, "nbytes", session._room.nbytes - need + 1)
        with pytest.raises(errors.PromptTooLongError, match=r"forks hold .* close them"):
            session.generate([prompt(50)], max_new_tokens=8)
        fork.close()
        assert session.generate([prompt(50)], max_new_tokens=8)


def test_a_conversation_goes_on_from_a_fork(smollm_model: Any, session: Session) -> None:
    system = [{"role": "system", "content": "You answer in one word."}]
    question = [*system, {"role": "user", "content": "What is the capital of France?"}]
    options = {"temperature": 0, "max_new_tokens": 6}
    with session.fork(system) as fork:
        found = fork.chat("What is the capital of France?", **options)
        assert found.text == session.chat(question, **options).text
        assert found.cached_tokens == fork.tokens > 8
        assert "".join(fork.stream("What is the capital of France?", **options)) == found.text
    with session.fork(question) as fork:
        assert fork.chat([], **options).text == found.text
        more = [{"role": "assistant", "content": "Paris"}, {"role": "user", "content": "And of Italy?"}]
        assert fork.chat(more, **options).text == session.chat([*question, *more], **options).text


def test_a_text_goes_on_where_its_last_word_changes(session: Session) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4}
    beginning, more = "The capital of France is Pa", ["ris, and that of Italy is", ""]
    with session.fork(beginning) as fork:
        found = fork.generate(more, **options)
    expected = session.generate([beginning + text for text in more], **options)
    assert [reply.text for reply in found] == [reply.text for reply in expected]


def test_wrong_uses_are_told(session: Session, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with session.fork("The capital of France") as fork, pytest.raises(errors.ConfigurationError, match="a list of messages"):
        fork.chat("Hi")
    with pytest.raises(errors.ConfigurationError, match="the fork is closed"):
        fork.generate([" is"])
    with session.fork([{"role": "system", "content": "Be short."}]) as fork:
        with pytest.raises(errors.ConfigurationError, match="fork a text"):
            fork.generate(["Hi"])
        with pytest.raises(errors.ConfigurationError, match="tokens of the prefix's"):
            fork.chat("Hi", chat_template="{{ messages[-1].content }} and so on and so on")
    with session.fork([5, 6, 7]) as fork, pytest.raises(errors.ConfigurationError, match="give token ids"):
        fork.generate(["Hi"])
    with pytest.raises(errors.ConfigurationError, match="saves nothing"):
        session.fork([5])
    model, _ = load("llama")
    with Session(model) as own:
        with own.fork(PREFIX) as fork:
            monkeypatch.setattr(held, "has_adapter", lambda _: True)
            with pytest.raises(errors.ConfigurationError, match="the model has changed"):
                fork.generate([[5]])
        with pytest.raises(errors.ConfigurationError, match="has an adapter"):
            own.fork(PREFIX)


@pytest.mark.parametrize("family", ["mamba"])
def test_models_whose_texts_cannot_be_forked_say_so(checkpoint: Any, streamed: Any, family: str) -> None:
    model = streamed(checkpoint(family))
    model.tokenizer = words(96)
    with Session(model) as session, pytest.raises(errors.ConfigurationError, match="whole prompts"):
        session.fork(PREFIX)
