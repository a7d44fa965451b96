"""Decoders with an encoder whose caches lie in tiers: answers of transformers with its EncoderDecoderCache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_tasks import BART, SIZES, SOUND, T5, own, save
from tiny import words
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from rabbit_engine import Session
from rabbit_engine.config import Cut
from rabbit_engine.errors import PromptTooLongError
from rabbit_engine.model import mixin, tiered_caches
from rabbit_engine.model.runtime import Runtime, runtime_of
from rabbit_engine.planning import demand as demands
from rabbit_engine.planning import texts
from rabbit_engine.planning.demand import KEPT_FREE_BYTES, Demand, cache_bytes, need_bytes, tier_bytes
from rabbit_engine.planning.probe import Probe, run_probe
from rabbit_engine.streaming import BlockHome, TextStates
from rabbit_engine.transformers_bridge.tiered import TieredCache, put_pair_in_tiers
from rabbit_engine.transformers_bridge.tiered_layers import TieredLayer

BLOCK = 4
_PART = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART),
    "longt5": ("LongT5ForConditionalGeneration", "LongT5Config", {**T5, "local_radius": 7}),
    "t5gemma": ("T5GemmaForConditionalGeneration", "T5GemmaConfig", {"encoder": _PART, "decoder": _PART, "vocab_size": 96}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SOUND),
}
"""Learnt, relative and rotary positions, windows beside growing layers, a sound."""


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[EncoderDecoderCache]]:
    """The caches that are put in tiers, small blocks in a folder of the test's."""
    found: list[EncoderDecoderCache] = []

    def noted(cache: EncoderDecoderCache, *rest: Any) -> None:
        put_pair_in_tiers(cache, *rest)
        found.append(cache)

    monkeypatch.setattr(tiered_caches, "BlockHome", partial(BlockHome, block_tokens=BLOCK))
    monkeypatch.setattr(texts, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(tiered_caches, "put_pair_in_tiers", noted)
    yield found
    for cache in found:
        cache.self_attention_cache.text.close()


@pytest.fixture
def tiers(paired: list[EncoderDecoderCache], monkeypatch: pytest.MonkeyPatch) -> list[EncoderDecoderCache]:
    """Every text of `generate` has all layers that can be in tiers there."""
    admit = mixin.admitted
    monkeypatch.setattr(mixin, "admitted", lambda *given: replace(admit(*given), tiered=3))
    return paired


def load(name: str, folder: Path, streamed: Any) -> tuple[Any, Any]:
    """The model streamed in the smallest budget, and as transformers loads it."""
    cls, config, sizes = MODELS[name]
    expected = own(save(cls, config, sizes, folder), cls)
    return streamed(folder, cut=Cut(least_bytes=1)), expected


def reads(name: str, sequences: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(sequences, 8, 20, generator=draw)}
    return {"input_ids": torch.randint(5, 90, (sequences, 41), generator=draw)}


def answer(model: Any, **keywords: Any) -> Any:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**(settings | {"output_scores": True} | keywords))


def require_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert torch.equal(ours, theirs)


def require_tiers(cache: EncoderDecoderCache, layers: int = 3) -> None:
    """Both caches are there, of one text, and blocks of both moved."""
    both = cache.self_attention_cache, cache.cross_attention_cache
    assert all(isinstance(each, TieredCache) and each.text is both[0].text for each in both)
    for each in both:
        found = [layer.states for layer in each.layers if isinstance(layer, TieredLayer)]
        assert len(found) == layers
        assert all(states._blocks for states in found)
    assert both[0].text.bytes_read > both[0].text.bytes_written > 0


@pytest.mark.parametrize("name", MODELS)
def test_answers_have_the_bits_of_transformers_caches(
    tmp_path: Path, streamed: Any, tiers: list[EncoderDecoderCache], name: str
) -> None:
    model, expected = load(name, tmp_path, streamed)
    require_same(answer(model, **reads(name)), answer(expected, **reads(name)))
    assert len(tiers) == 1
    require_tiers(tiers[0], layers=1 if name == "t5gemma" else 3)  # two of its layers have windows


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "drawn beams": {"num_beams": 3, "do_sample": True},
    "drawn": {"do_sample": True, "temperature": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "padded": {"attention_mask": (torch.arange(41) < torch.tensor([[41], [17]])).long()},
    "begun": {"decoder_input_ids": torch.tensor([[0, 7, 9, 11], [0, 8, 3, 12]])},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_every_way_of_generating(tmp_path: Path, streamed: Any, tiers: list[EncoderDecoderCache], name: str, way: str) -> None:
    model, expected = load(name, tmp_path, streamed)
    require_same(*(answer(each, **reads(name), **WAYS[way]) for each in (model, expected)))
    require_tiers(tiers[0])


def test_guesses_are_taken_back(tmp_path: Path, streamed: Any, tiers: list[EncoderDecoderCache]) -> None:
    model, expected = load("bart", tmp_path, streamed)
    found, same = (answer(each, **reads("bart", 1), prompt_lookup_num_tokens=3) for each in (model, expected))
    assert torch.equal(found.sequences, same.sequences)
    if same.sequences.shape[1] > 1:  # old releases end such answers at once
        require_tiers(tiers[0])


def test_a_long_sound_has_a_cache_for_each_part(tmp_path: Path, streamed: Any, tiers: list[EncoderDecoderCache]) -> None:
    model, expected = load("whisper", tmp_path, streamed)
    sound = {"input_features": torch.randn(1, 8, 50, generator=torch.Generator().manual_seed(4))}
    given = {"max_new_tokens": 15, "do_sample": False, "return_timestamps": True, "attention_mask": torch.ones(1, 50)}
    for each in (model, expected):
        each.generation_config.no_timestamps_token_id = 60
    assert torch.equal(model.generate(**sound, **given), expected.generate(**sound, **given))
    assert len(tiers) > 1


def states(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, tokens, 8), torch.randn(2, 4, tokens, 8)


def grow(caches: list[EncoderDecoderCache], tokens: int) -> None:
    """A pass, of which the first reads 30 tokens."""
    for index in range(3):
        of_decoder, of_encoder = states(tokens), states(30)
        for cache in caches:
            cache.self_attention_cache.update(*of_decoder, index)
            if not cache.is_updated[index]:
                cache.cross_attention_cache.update(*of_encoder, index)
                cache.is_updated[index] = True


def require_equal(ours: EncoderDecoderCache, theirs: EncoderDecoderCache) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    for name in ("self_attention_cache", "cross_attention_cache"):
        for mine, its in zip(getattr(ours, name).layers, getattr(theirs, name).layers, strict=True):
            assert torch.equal(mine.keys, its.keys)
            assert torch.equal(mine.values, its.values)


def test_a_copy_shares_blocks_and_goes_on_alone(tmp_path: Path) -> None:
    config = transformers.BartConfig(**BART)
    ours, theirs = (EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)) for _ in range(2))
    put_pair_in_tiers(ours, 3, TextStates(BlockHome(tmp_path, BLOCK)), 30)
    grow([ours, theirs], 9)
    second, other = copy.deepcopy(ours), copy.deepcopy(theirs)
    blocks = [cache.cross_attention_cache.layers[1].states._blocks[0].stored for cache in (ours, second)]
    assert blocks[0] is blocks[1]
    assert second.self_attention_cache.text is second.cross_attention_cache.text is not ours.self_attention_cache.text
    grow([ours, theirs], 3)
    grow([second, other], 20)
    for each in (ours, theirs):
        each.reorder_cache(torch.tensor([1, 1]))
        each.crop(-5)
    for each in (second, other):
        each.batch_repeat_interleave(2)
        each.batch_select_indices(torch.tensor([0, 3]))
    require_equal(ours, theirs)
    require_equal(second, other)


def on_meta(name: str) -> Probe:
    cls, config, sizes = MODELS[name]
    with torch.device("meta"):
        return run_probe(getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval())


def test_a_plan_counts_both_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demands, "_TAIL_TOKENS", 3 * BLOCK)
    monkeypatch.setattr(demands, "BLOCK_TOKENS", BLOCK)
    token = 2 * 32 * 4
    text, sound = on_meta("bart"), on_meta("whisper")
    assert (text.growing_layers, text.layer_caches, text.growing_token_bytes, text.fixed_layer_bytes) == (3, 2, token, 0)
    assert (sound.growing_layers, sound.layer_caches, sound.growing_token_bytes) == (3, 2, token)
    assert sound.fixed_layer_bytes == SOUND["max_source_positions"] * token
    demand = Demand(1, 31, 4, tiered=3)
    assert tier_bytes(sound, demand) == cache_bytes(sound, replace(demand, tiered=0)) == 4 * 3 * (32 + 10) * token
    deep = replace(sound, growing_layers=9, cache_token_bytes=9 * token, cache_fixed_bytes=9 * sound.fixed_layer_bytes)
    held = 3 * (42 + BLOCK) + 9 * 2 * 3 * BLOCK  # whole layers, and tails
    assert cache_bytes(deep, replace(demand, tiered=9)) == 4 * held * token


def deep_bart(folder: Path, streamed: Any) -> tuple[Any, Any]:
    sizes = {**BART, "decoder_layers": 12, "encoder_layers": 1}
    expected = own(save("BartForConditionalGeneration", "BartConfig", sizes, folder), "BartForConditionalGeneration")
    return streamed(folder, cut=Cut(least_bytes=1)), expected


def test_a_text_that_does_not_fit_lies_in_tiers_unasked(
    tmp_path: Path, streamed: Any, paired: list[EncoderDecoderCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demands, "_TAIL_TOKENS", 3 * BLOCK)
    monkeypatch.setattr(demands, "BLOCK_TOKENS", BLOCK)
    model, expected = deep_bart(tmp_path, streamed)
    ids = torch.randint(5, 90, (1, 400), generator=torch.Generator().manual_seed(1))
    need = need_bytes(runtime_of(model).partition.probe, Demand(400, 15, tiered=7)) + KEPT_FREE_BYTES
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: need)
    require_same(answer(model, input_ids=ids), answer(expected, input_ids=ids))
    (cache,) = paired
    require_tiers(cache, layers=7)
    given = EncoderDecoderCache(*(DynamicCache(config=expected.config.get_text_config(decoder=True)) for _ in range(2)))
    with pytest.raises(PromptTooLongError):  # which stays where the caller put it
        answer(model, input_ids=ids, past_key_values=given)
    monkeypatch.setattr(texts, "cache_folder", lambda: None)
    with pytest.raises(PromptTooLongError):
        answer(model, input_ids=ids)


def test_a_session_has_long_texts_beside_short_ones(
    tmp_path: Path, streamed: Any, paired: list[EncoderDecoderCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demands, "_TAIL_TOKENS", 3 * BLOCK)
    monkeypatch.setattr(demands, "BLOCK_TOKENS", BLOCK)
    model, expected = deep_bart(tmp_path, streamed)
    model.tokenizer = words(96)
    long, short = (torch.randint(5, 90, (1, tokens), generator=torch.Generator().manual_seed(1)) for tokens in (200, 9))
    with Session(model, max_requests=3) as session:
        room = replace(session._room, nbytes=need_bytes(session._room.probe, Demand(200, 8)) - 1)
        monkeypatch.setattr(session, "_room", room)
        monkeypatch.setattr(session._engine, "_room", room)
        replies = session.generate([each[0].tolist() for each in (long, short, long)], max_new_tokens=8, ignore_eos=True)
    same = [
        expected.generate(each, max_new_tokens=8, eos_token_id=None, do_sample=False)[0, 1:].tolist() for each in (long, short)
    ]
    assert [list(reply.tokens) for reply in replies] == [same[0], same[1], same[0]]
    assert len(paired) == 2
    require_tiers(paired[0], layers=12)
