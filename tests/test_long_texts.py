"""Texts whose caches lie in tiers: answers of transformers with its DynamicCache, in every way of generating."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from long_texts import BLOCK, answer, have_all_in_tiers, prompt
from tiny import words

from rabbit_engine import Session
from rabbit_engine.decoding.lookup import Lookup
from rabbit_engine.errors import BudgetError, CacheStorageError, PromptTooLongError
from rabbit_engine.model import mixin
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning import demand as demands
from rabbit_engine.planning import texts
from rabbit_engine.planning.demand import KEPT_FREE_BYTES, Demand, Ways, best_way, need_bytes, tier_bytes
from rabbit_engine.planning.probe import Curve, Probe
from rabbit_engine.sessions.room import Room
from rabbit_engine.transformers_bridge.tiered import TieredCache
from rabbit_engine.transformers_bridge.tiered_layers import TieredLayer
from rabbit_engine.utils.platform import IN_MEMORY, file_system_of
from rabbit_engine.utils.speeds import Speeds

FAMILIES = [
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "gemma3n",
    "qwen2",
    "qwen3",
    "gpt2",
    "phi3",
    "deepseek_v3",
    "cohere2",
    "mixtral",
]
"""Plain, with windows in all or some layers, with keys that layers share, latent attention, learnt positions."""

OTHERS = ["qwen3_next", "qwen3_5", "jamba", "llama4", "mpt", "bloom", "falcon", "gpt_oss"]
"""Recurrent states beside growing layers, attention in chunks, biases instead of positions, sinks."""


@pytest.fixture
def tiers(made: list[TieredCache], monkeypatch: pytest.MonkeyPatch) -> list[TieredCache]:
    """Every text of `generate` has all layers that can be in tiers there."""
    have_all_in_tiers(monkeypatch)
    return made


def require_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert torch.equal(ours, theirs)


ALL_SLIDING = ("mistral", "cohere2")

DEEPER = {"qwen3_next": {"num_hidden_layers": 8}, "qwen3_5": {"num_hidden_layers": 8}}
"""With more than one growing layer: a single one has no other's turn to make room for."""


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint of a family."""
    deeper = {name: families.save(name, tmp_path_factory.mktemp(name), **changes) for name, changes in DEEPER.items()}
    return lambda family: deeper.get(family) or checkpoint(family)


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_answers_have_the_bits_of_a_dynamic_cache(
    checkpoints: Any, streamed: Any, plain: Any, tiers: list[TieredCache], family: str
) -> None:
    folder = checkpoints(family)
    model, own = streamed(folder), plain(folder)
    require_same(answer(model, prompt()), answer(own, prompt()))
    if family in ALL_SLIDING:
        assert tiers == []
        return
    (cache,) = tiers
    grows = sum(isinstance(layer, TieredLayer) for layer in cache.layers)
    assert runtime_of(model).partition.probe.growing_layers in (0, grows)  # some do not run on the meta device
    assert (cache.text.bytes_written > 0) == (cache.text.bytes_read > 0) == (grows > 0)


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "drawn beams": {"num_beams": 3, "do_sample": True},
    "drawn": {"do_sample": True, "temperature": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "guessed": {"prompt_lookup_num_tokens": 4},
    "in chunks": {"prefill_chunk_size": 8},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3n"])
def test_every_way_of_generating(
    checkpoint: Any, streamed: Any, plain: Any, tiers: list[TieredCache], family: str, way: str
) -> None:
    folder = checkpoint(family)
    found, expected = (answer(model, prompt(), **WAYS[way]) for model in (streamed(folder), plain(folder)))
    assert torch.equal(found.sequences, expected.sequences)
    assert tiers[0].text.bytes_written > 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize("drawn", [False, True])
def test_speculated(checkpoints: Any, streamed: Any, plain: Any, tiers: list[TieredCache], family: str, drawn: bool) -> None:
    folder = checkpoints(family)
    ids = torch.cat([prompt(17), prompt(17), prompt(9)], dim=1)
    found = answer(streamed(folder), ids, speculate=Lookup(nodes=8), do_sample=drawn, max_new_tokens=24)
    expected = answer(plain(folder), ids, do_sample=drawn, max_new_tokens=24)
    assert torch.equal(found.sequences, expected.sequences)
    assert tiers[0].text.bytes_written > 0


def test_a_padded_batch(checkpoint: Any, streamed: Any, plain: Any, tiers: list[TieredCache]) -> None:
    folder, ids = checkpoint("llama"), prompt(41, 3)
    mask = torch.ones_like(ids)
    mask[1, :9], mask[2, :30] = 0, 0
    require_same(*(answer(model, ids, attention_mask=mask) for model in (streamed(folder), plain(folder))))
    assert tiers[0].text.bytes_written > 0


def test_a_returned_cache_goes_on_and_is_copied_without_its_blocks(
    checkpoint: Any, streamed: Any, plain: Any, tiers: list[TieredCache]
) -> None:
    folder = checkpoint("llama")
    model, own = streamed(folder), plain(folder)
    first, its = answer(model, prompt()), answer(own, prompt())
    caches = [first.past_key_values, copy.deepcopy(first.past_key_values)]
    shared = [[block.stored for block in cache.layers[1].states._blocks] for cache in caches]
    assert shared[0] == shared[1] != []
    for more, cache in zip((prompt(5), prompt(11)), caches, strict=True):
        theirs = copy.deepcopy(its.past_key_values)
        ids = torch.cat([first.sequences, more], dim=1)
        require_same(answer(model, ids, past_key_values=cache), answer(own, ids, past_key_values=theirs))
    assert len(tiers) == 1


def test_a_text_that_does_not_fit_lies_in_tiers_unasked(
    tmp_path: Path, streamed: Any, plain: Any, made: list[TieredCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = families.save("llama", tmp_path / "model", num_hidden_layers=12)
    model, ids = streamed(folder), prompt(400)
    monkeypatch.setattr(demands, "_TAIL_TOKENS", 3 * BLOCK)
    monkeypatch.setattr(demands, "BLOCK_TOKENS", BLOCK)
    runtime = runtime_of(model)
    probe = runtime.partition.probe
    need = need_bytes(probe, Demand(400, 12, tiered=7)) + KEPT_FREE_BYTES
    monkeypatch.setattr(type(runtime.assembly), "free_bytes", lambda _: need)
    require_same(answer(model, ids), answer(plain(folder), ids))
    (cache,) = made
    assert sum(isinstance(layer, TieredLayer) for layer in cache.layers) == 7
    monkeypatch.setattr(texts, "cache_folder", lambda: None)
    with pytest.raises(PromptTooLongError, match="enough for a prompt of"):
        answer(model, ids)


def test_a_session_has_long_texts_beside_short_ones(
    tmp_path: Path, streamed: Any, plain: Any, made: list[TieredCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = families.save("llama", tmp_path / "model", num_hidden_layers=12)
    model, own = streamed(folder), plain(folder)
    monkeypatch.setattr(demands, "_TAIL_TOKENS", 3 * BLOCK)
    monkeypatch.setattr(demands, "BLOCK_TOKENS", BLOCK)
    monkeypatch.setattr("rabbit_engine.sessions.generation.make_cache", mixin.make_cache)
    long, short = prompt(200)[0].tolist(), prompt(9)[0].tolist()
    model.tokenizer = words(96)
    with Session(model, max_requests=3) as session:
        room = session._room
        whole = need_bytes(room.probe, Demand(200, 8))
        monkeypatch.setattr(session, "_room", replace(room, nbytes=whole - 1))
        monkeypatch.setattr(session._engine, "_room", session._room)
        assert session._room.demand(200, 8).tiered
        replies = session.generate([long, short, long], max_new_tokens=8)
    answers = (answer(own, torch.tensor([ids]), max_new_tokens=8).sequences[0, len(ids) :] for ids in (long, short))
    expected = [model.tokenizer.decode(ids) for ids in answers]
    assert [reply.text for reply in replies] == [expected[0], expected[1], expected[0]]
    assert len(made) == 2


def test_a_full_disk_ends_the_answer_and_says_what_to_do(
    checkpoint: Any, streamed: Any, tiers: list[TieredCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(checkpoint("llama"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rabbit_engine.storage.scratchfile.ScratchFile._move", full)
        with pytest.raises(CacheStorageError, match=r"No space left on device.*free some of its disk"):
            answer(model, prompt())
    answer(model, prompt())  # the model is as it was


PROBE = Probe(cache_token_bytes=1000, growing_layers=20, growing_token_bytes=50, layers=Curve(0, 100, 0), vocabulary=1)


def test_the_fewest_layers_that_do_are_in_tiers() -> None:
    text = Demand(100_000, 0)
    whole, least = (need_bytes(PROBE, replace(text, tiered=layers)) for layers in (0, 20))
    assert best_way(PROBE, text, whole, Ways(disk_bytes=10**12)) == text
    assert best_way(PROBE, text, whole - 1, Ways(disk_bytes=10**12)).tiered == 4
    assert best_way(PROBE, text, least, Ways(disk_bytes=10**12)).tiered == 20
    assert best_way(PROBE, text, least - 1, Ways(disk_bytes=10**12)) == text
    assert best_way(PROBE, text, least, Ways(disk_bytes=tier_bytes(PROBE, replace(text, tiered=20)) - 1)) == text
    for free in range(least, whole, (whole - least) // 7):
        found = best_way(PROBE, text, free, Ways(disk_bytes=10**12))
        assert need_bytes(PROBE, found) <= free
        assert found.tiered == 4 or need_bytes(PROBE, replace(found, tiered=found.tiered - 1)) > free


def test_a_long_text_leaves_half_of_the_memory_to_others() -> None:
    text = Demand(100_000, 0)
    whole = need_bytes(PROBE, text)
    room = Room(whole - 1, PROBE, ways=Ways(disk_bytes=10**12))
    assert room.demand(100_000, 0).tiered > 4
    assert need_bytes(PROBE, room.demand(100_000, 0)) <= whole // 2
    assert replace(room, nbytes=whole).demand(100_000, 0) == text


def test_max_seq_len_reserves_memory_for_a_text_in_tiers_where_its_cache_does_not_fit(
    tmp_path: Path, streamed: Any, plain: Any, made: list[TieredCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = families.save("llama", tmp_path / "model", num_hidden_layers=12, max_position_embeddings=4096)
    with pytest.raises(BudgetError) as small:
        streamed(folder, max_memory={"cpu": 1})
    least = small.value.smallest_bytes
    kept = streamed(folder, max_memory={"cpu": 10**9}, max_seq_len=4000)
    assert any(note.endswith("for 4,000 tokens, in memory") for note in kept.plan.notes)
    reserved = least + kept.plan.reserved_bytes * 3 // 4
    model = streamed(folder, max_memory={"cpu": reserved}, max_seq_len=4000)
    assert any("lie on disk and are read for each token" in note for note in model.plan.notes)
    assert model.plan.reserved_bytes < kept.plan.reserved_bytes
    monkeypatch.setattr(texts, "cache_folder", lambda: None)
    with pytest.raises(BudgetError, match="for the tokens of max_seq_len"):
        streamed(folder, max_memory={"cpu": reserved}, max_seq_len=4000)


def test_a_setting_may_name_the_kind_of_cache(checkpoint: Any, streamed: Any, plain: Any, tiers: list[TieredCache]) -> None:
    model, own = (load(checkpoint("llama")) for load in (streamed, plain))
    require_same(*(answer(each, prompt(), cache_implementation="dynamic") for each in (model, own)))
    model.generation_config.cache_implementation = "dynamic"
    require_same(answer(model, prompt()), answer(own, prompt()))
    model.tokenizer = words(96)
    with Session(model) as session:
        session.generate([prompt()[0].tolist()], max_new_tokens=2)
    assert tiers[1].text.bytes_written > 0


def test_an_assistant_takes_back_its_guesses(checkpoint: Any, streamed: Any, plain: Any, tiers: list[TieredCache]) -> None:
    """Its layers with windows record what they forget."""
    folder = checkpoint("gemma3")
    own = plain(folder)
    found, expected = (answer(own, prompt(), assistant_model=load(folder), do_sample=True) for load in (streamed, plain))
    assert torch.equal(found.sequences, expected.sequences)
    assert tiers[0].text.bytes_written > 0


def test_a_cache_of_inference_mode_goes_on_without_it(
    checkpoint: Any, streamed: Any, plain: Any, tiers: list[TieredCache]
) -> None:
    model, own = (load(checkpoint("llama")) for load in (streamed, plain))
    with torch.inference_mode():
        caches = [answer(each, prompt()).past_key_values for each in (model, own)]
    ids = prompt(60)
    require_same(*(answer(each, ids, past_key_values=cache) for each, cache in zip((model, own), caches, strict=True)))
    assert len(tiers) == 1


def test_a_folder_in_memory_takes_no_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: Any, checkpoint: Any
) -> None:
    monkeypatch.setattr(texts, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(texts, "file_system_of", lambda _: "ext4")
    assert texts.disk_room() > 0
    monkeypatch.setattr(texts, "file_system_of", lambda _: "tmpfs")
    monkeypatch.setattr(texts.sys, "platform", "linux")
    assert texts.disk_room() == 0
    model = streamed(checkpoint("llama"))
    monkeypatch.setattr(type(runtime_of(model).assembly), "free_bytes", lambda _: KEPT_FREE_BYTES)
    with pytest.raises(PromptTooLongError, match=r"cannot lie on disk, as .*texts is memory \(tmpfs\): name a folder on a disk"):
        answer(model, prompt())


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no folder here is known to be memory")
def test_shared_memory_is_known_to_be_memory() -> None:
    assert file_system_of(Path("/dev/shm/not/there")) in IN_MEMORY


def test_a_plan_says_where_a_text_lies() -> None:
    text, speeds = Demand(100_000, 0, tiered=20), Speeds(disk=1e9, link=1e10)
    far = tier_bytes(PROBE, text)
    assert "lie on disk and are read for each token, in about 0.1 s" in texts.note_on_texts(PROBE, text, speeds, far - 1)
    assert "lie in host memory and are read for each token, in about 0.01 s" in texts.note_on_texts(PROBE, text, speeds, far)
