"""Caches in eight bits: close to those of transformers, in half the bytes, whatever is done to them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import words
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from rabbit_engine import PrefixStore, Session
from rabbit_engine.caches import decode_states, encode_states
from rabbit_engine.decoding.lookup import Lookup
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model import mixin, tiered_caches
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning import texts
from rabbit_engine.planning.demand import Demand, Ways, best_way, encoded_demand, need_bytes, tier_bytes
from rabbit_engine.planning.probe import Curve, Probe
from rabbit_engine.storage.directio import aligned_up
from rabbit_engine.streaming.caches.states import BlockHome, TextStates
from rabbit_engine.transformers_bridge.tiered import TieredCache
from rabbit_engine.transformers_bridge.tiered_layers import TieredLayer

LAYERS, BLOCK = 3, 4
CONFIG = LlamaConfig(num_hidden_layers=LAYERS)
PLACES = ["disk", "memory"]


def home(place: str, folder: Path, block: int = BLOCK) -> BlockHome:
    return BlockHome(folder if place == "disk" else None, block, encoded=True)


def states(rows: int, tokens: int, width: int = 64, dtype: torch.dtype = torch.float32):
    return torch.randn(rows, 2, tokens, width, dtype=dtype), torch.randn(rows, 2, tokens, width // 2, dtype=dtype)


def update(caches, rows: int, tokens: int) -> None:
    for index in range(LAYERS):
        new = states(rows, tokens)
        for found, wanted in zip(*(cache.update(*new, index) for cache in caches), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0.06)
            assert torch.equal(found[:, :, -tokens:], wanted[:, :, -tokens:])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [64, 48])
def test_a_layer_shows_what_the_form_decodes_to(tmp_path: Path, place: str, dtype: torch.dtype, width: int) -> None:
    text = TextStates(home(place, tmp_path, 16))
    first, second = text.new_layer(), text.new_layer()
    given = states(2, 60, width, dtype)
    assert all(torch.equal(*pair) for pair in zip(first.append(*given), given, strict=True))  # exact in its own pass
    second.append(*given)
    for layer in (first, second, first):  # the last turn reads what was written by then
        shown = layer.all()
    for found, was in zip(shown, given, strict=True):
        assert torch.equal(found[:, :, :32], decode_states(*encode_states(was[:, :, :32]), dtype))
        assert torch.equal(found[:, :, 32:], was[:, :, 32:])
    assert (text.bytes_read > 0) == (text.bytes_written > 0) == (place == "disk")


@pytest.mark.parametrize("place", PLACES)
def test_blocks_have_eight_bits_and_a_half_for_each_number(tmp_path: Path, place: str) -> None:
    cache = TieredCache(CONFIG, range(LAYERS), TextStates(home(place, tmp_path, 32)))
    for _ in range(2):
        for index in range(LAYERS):
            cache.update(*states(1, 64, dtype=torch.bfloat16), index)
    block = cache.layers[0].states._blocks[0].stored
    assert block.states is None
    assert block.nbytes * 8 == 2 * 32 * (64 + 32) * 8.5
    if place == "memory":
        assert block.memory.nbytes == block.nbytes
    else:
        assert block.memory is None  # it lies in the file alone
        assert 0 < cache.text.file_bytes <= 3 * LAYERS * aligned_up(block.nbytes)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("seed", range(2))
def test_every_operation_at_random(tmp_path: Path, place: str, seed: int) -> None:
    draw, rows = random.Random(seed), 2
    torch.manual_seed(seed)
    ours, theirs = TieredCache(CONFIG, range(LAYERS), TextStates(home(place, tmp_path))), DynamicCache(config=CONFIG)
    update((ours, theirs), rows, draw.randint(1, 40))
    for _ in range(16):
        match draw.randrange(6):
            case 0:
                count = draw.randint(0, 9)
                ours.crop(-count), theirs.crop(-count)
            case 1:
                order = torch.tensor([draw.randrange(rows) for _ in range(rows)])
                ours.reorder_cache(order), theirs.reorder_cache(order)
            case 2 if rows < 5:
                ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
                rows *= 2
            case 3:
                ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
            case _:
                update((ours, theirs), rows, draw.choice((1, 1, 5, 17)))
    update((ours, theirs), rows, 1)
    assert ours.get_seq_length() == theirs.get_seq_length()


# In models.


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[TieredCache]]:
    """The caches that are made, in blocks of four tokens."""
    found: list[TieredCache] = []

    def noted(runtime: Any, demand: Demand) -> Any:
        found.extend([cache] if (cache := tiered_caches.make_cache(runtime, demand)) is not None else [])
        return cache

    monkeypatch.setattr(tiered_caches, "BlockHome", partial(BlockHome, block_tokens=BLOCK))
    monkeypatch.setattr(texts, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(mixin, "make_cache", noted)
    monkeypatch.setattr("rabbit_engine.sessions.generation.make_cache", noted)
    yield found
    for cache in found:
        cache.text.close()


def answer(model: Any, ids: torch.Tensor, **keywords: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return model.generate(ids, **({"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | keywords))


def logits_after(model: Any, ids: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """Of each of twelve tokens, chosen beforehand."""
    chosen = torch.arange(10, 22)
    found = answer(
        model,
        ids,
        output_logits=True,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda _, so_far: [int(chosen[len(so_far) - ids.shape[1]])],
        **keywords,
    )
    return torch.stack(found.logits, dim=1)


def prompt(tokens: int = 41) -> torch.Tensor:
    return torch.randint(5, 90, (1, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "deepseek_v3"])
def test_logits_are_close_to_those_of_the_exact_cache(
    checkpoint: Any, streamed: Any, plain: Any, made: list[TieredCache], family: str
) -> None:
    folder = checkpoint(family)
    found, exact = logits_after(streamed(folder, cache_dtype="int8"), prompt()), logits_after(plain(folder), prompt())
    assert torch.equal(found[:, 0], exact[:, 0])  # the prompt's pass sees what it computed
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02 * float(exact.std()))
    (cache,) = made
    layer = next(layer for layer in cache.layers if isinstance(layer, TieredLayer))
    assert layer.states._blocks[0].stored.memory is not None
    assert cache.text.bytes_written == 0


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "guessed": {"prompt_lookup_num_tokens": 4},
    "speculated": {"speculate": Lookup(nodes=8)},
    "in chunks": {"prefill_chunk_size": 8},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_every_way_of_generating(
    checkpoint: Any, streamed: Any, plain: Any, made: list[TieredCache], monkeypatch: pytest.MonkeyPatch, way: str, place: str
) -> None:
    folder, ids = checkpoint("llama"), torch.cat([prompt(17), prompt(17), prompt(9)], dim=1)
    if place == "disk":
        monkeypatch.setattr(mixin, "admitted", lambda *given: replace(admit(*given), held=False))
    found = answer(streamed(folder, cache_dtype="int8"), ids, **WAYS[way])
    exact = answer(plain(folder), ids, **{name: value for name, value in WAYS[way].items() if name != "speculate"})
    assert torch.equal(found, exact)
    assert (made[0].text.bytes_written > 0) == (place == "disk")


admit = mixin.admitted


def test_a_session_keeps_its_texts_in_eight_bits_and_stores_no_prefixes(
    tmp_path: Path, checkpoint: Any, streamed: Any, plain: Any, made: list[TieredCache], caplog: pytest.LogCaptureFixture
) -> None:
    folder, ids = checkpoint("llama"), prompt()
    model = streamed(folder, cache_dtype="int8")
    model.tokenizer = words(96)
    with PrefixStore(tmp_path / "prefixes", 10**6) as store, Session(model, prefix_store=store) as session:
        (reply,) = session.generate([ids[0].tolist()], max_new_tokens=8)
    exact = answer(plain(folder), ids, max_new_tokens=8)[0, ids.shape[1] :]
    assert reply.text == model.tokenizer.decode(exact)
    assert [cache.layers[0].states._blocks[0].stored.states for cache in made] == [None]
    assert "prompts are not stored: cache_dtype='int8' keeps other states" in caplog.text


def test_a_callers_own_cache_is_left_as_it_is(checkpoint: Any, streamed: Any, made: list[TieredCache]) -> None:
    model = streamed(checkpoint("llama"), cache_dtype="int8")
    answer(model, prompt(), past_key_values=DynamicCache(config=model.config))
    answer(model, prompt(), cache_implementation="static")
    assert made == []


def test_what_cannot_be_is_refused(checkpoint: Any, streamed: Any) -> None:
    with pytest.raises(ConfigurationError, match="cache_dtype='int4' is not 'int8', or None for the model's own"):
        streamed(checkpoint("llama"), cache_dtype="int4")
    with pytest.raises(ConfigurationError, match="none is known in the cache of MistralForCausalLM: leave it out"):
        streamed(checkpoint("mistral"), cache_dtype="int8")  # all its layers forget


PROBE = Probe(
    cache_token_bytes=1000, growing_layers=20, growing_token_bytes=50, int8_token_bytes=27, layers=Curve(0, 100, 0), vocabulary=1
)


def test_plans_count_the_smaller_bytes() -> None:
    text = Demand(100_000, 0)
    held, away = (encoded_demand(PROBE, text, held=held) for held in (True, False))
    assert need_bytes(PROBE, held) == need_bytes(PROBE, away) + 20 * 27 * 100_000
    assert need_bytes(PROBE, held) < 0.8 * need_bytes(PROBE, text)
    assert (tier_bytes(PROBE, held), tier_bytes(PROBE, away)) == (0, 20 * 27 * 100_000)
    ways = Ways(disk_bytes=10**12, encoded=True, holds=True)
    assert best_way(PROBE, text, 10**12, ways) == held
    assert best_way(PROBE, text, need_bytes(PROBE, held) - 1, ways) == away
    assert best_way(PROBE, text, need_bytes(PROBE, away) - 1, ways) == held  # too long either way
    assert best_way(PROBE, text, 10**12, replace(ways, holds=False)) == away


def test_the_probe_knows_the_bytes_of_a_token(checkpoint: Any, streamed: Any) -> None:
    probe = runtime_of(streamed(checkpoint("llama"))).partition.probe
    numbers = probe.growing_token_bytes // 4
    assert numbers < probe.int8_token_bytes <= 1.25 * numbers  # a scale for heads of eight numbers
