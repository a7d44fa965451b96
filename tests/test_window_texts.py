"""Texts whose layers with windows lie in tiers too: answers of transformers, and when a plan puts them there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from long_texts import BLOCK, answer, made_caches, prompt
from transformers import DynamicCache

from rabbit_engine.decoding.lookup import Lookup
from rabbit_engine.errors import PromptTooLongError
from rabbit_engine.model import mixin, tiered_caches
from rabbit_engine.model.runtime import Runtime, runtime_of
from rabbit_engine.planning import demand as demands
from rabbit_engine.planning import texts
from rabbit_engine.planning.demand import KEPT_FREE_BYTES, Demand, Ways, best_way, cache_bytes, need_bytes, tier_bytes
from rabbit_engine.planning.probe import Curve, Probe, run_probe
from rabbit_engine.planning.windows import Windows
from rabbit_engine.transformers_bridge.tiered import TieredCache, growing_indices, window_indices
from rabbit_engine.transformers_bridge.tiered_layers import TieredLayer, TieredWindowLayer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[TieredCache]]:
    """The caches in tiers that `generate` makes."""
    with made_caches(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture
def tiers(made: list[TieredCache], monkeypatch: pytest.MonkeyPatch) -> list[TieredCache]:
    """Every text of `generate` has all layers in tiers that can be there."""
    admit = mixin.admitted

    def admitted(runtime: Any, ids: Any, given: Any, asked: Any) -> Demand:
        layers = DynamicCache(config=runtime.architecture.config.get_text_config()).layers
        counts = [len(indices(layers)) for indices in (growing_indices, window_indices)]
        tiered, windows = counts if tiered_caches.may_tier(given, asked) else (0, 0)
        return replace(admit(runtime, ids, given, asked), tiered=tiered, windows=windows)

    monkeypatch.setattr(mixin, "admitted", admitted)
    return made


def kinds(cache: TieredCache) -> tuple[int, int]:
    """How many layers are in tiers, of those that keep all and of those with windows, all of which moved blocks."""
    assert cache.text.bytes_read > 0
    assert cache.text.bytes_written > 0
    cache.text.end_turn_before(None)
    windows = [layer for layer in cache.layers if isinstance(layer, TieredWindowLayer) and layer.is_initialized]
    assert all(layer.states._blocks for layer in windows)
    return sum(isinstance(layer, TieredLayer) for layer in cache.layers), len(windows)


FAMILIES = {"mistral": (0, 3), "gemma3": (1, 6), "gemma3n": (1, 2), "gpt_oss": (1, 2), "llama4": (1, 3)}
"""Windows alone, most layers, keys that layers share, sinks, chunks."""


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_have_the_bits_of_a_dynamic_cache(
    checkpoint: Any, streamed: Any, plain: Any, tiers: list[TieredCache], family: str
) -> None:
    found, expected = (answer(load(checkpoint(family)), prompt()) for load in (streamed, plain))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.scores, expected.scores, strict=True))
    assert kinds(tiers[0]) == FAMILIES[family]


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "guessed": {"prompt_lookup_num_tokens": 4},
    "in chunks": {"prefill_chunk_size": 8},
    "speculated": {"speculate": Lookup(nodes=8), "max_new_tokens": 24},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_every_way_of_generating(
    checkpoint: Any, streamed: Any, plain: Any, tiers: list[TieredCache], family: str, way: str
) -> None:
    ids = torch.cat([prompt(17), prompt(17), prompt(9)], dim=1)
    theirs = {name: value for name, value in WAYS[way].items() if name != "speculate"}
    found = answer(streamed(checkpoint(family)), ids, **WAYS[way])
    expected = answer(plain(checkpoint(family)), ids, **theirs)
    assert torch.equal(found.sequences, expected.sequences)
    assert kinds(tiers[0]) == FAMILIES[family]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for blocks of as few tokens."""
    monkeypatch.setattr(demands, "_TAIL_TOKENS", 3 * BLOCK)
    monkeypatch.setattr(demands, "BLOCK_TOKENS", BLOCK)


@pytest.mark.usefixtures("small_blocks")
def test_windows_that_do_not_fit_lie_in_tiers_unasked(
    tmp_path: Path, streamed: Any, plain: Any, made: list[TieredCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = families.save("mistral", tmp_path / "model", num_hidden_layers=12, sliding_window=64)
    model, ids = streamed(folder), prompt(100, 8)
    probe = runtime_of(model).partition.probe
    assert (probe.cache_token_bytes, probe.growing_layers) == (0, 0)
    assert (probe.windows.layers, probe.windows.tokens) == (12, 64)
    need = need_bytes(probe, Demand(100, 12, 8, windows=9)) + KEPT_FREE_BYTES
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: need)
    found, expected = answer(model, ids), answer(plain(folder), ids)
    assert torch.equal(found.sequences, expected.sequences)
    assert kinds(made[0])[1] <= 9
    monkeypatch.setattr(texts, "cache_folder", lambda: None)
    with pytest.raises(PromptTooLongError):
        answer(model, ids)


WINDOWED = Probe(
    cache_token_bytes=400,
    growing_layers=4,
    growing_token_bytes=100,
    windows=Windows(10, 2000, 1000),
    layers=Curve(0, 100, 0),
    vocabulary=1,
)


def test_windows_follow_the_layers_that_grow() -> None:
    text, room = Demand(5000, 0, is_computed=True), Ways(disk_bytes=10**12)
    whole, grown, all_there = (
        need_bytes(WINDOWED, replace(text, tiered=tiered, windows=windows)) for tiered, windows in ((0, 0), (4, 0), (4, 10))
    )
    assert whole > grown > all_there
    assert best_way(WINDOWED, text, whole, room) == text
    assert best_way(WINDOWED, text, grown, room) == replace(text, tiered=4)
    fewest = best_way(WINDOWED, text, grown - 1, room)
    assert 0 < fewest.windows < 10
    assert need_bytes(WINDOWED, replace(fewest, windows=fewest.windows - 1)) > grown - 1
    assert best_way(WINDOWED, text, all_there, room) == replace(text, tiered=4, windows=10)
    assert best_way(WINDOWED, text, all_there - 1, room) == text


def test_windows_take_what_they_show() -> None:
    text = Demand(5000, 0)
    assert cache_bytes(WINDOWED, replace(text, is_computed=True)) == 400 * 5000 + 1000 * 2001
    assert cache_bytes(WINDOWED, text) == (400 + 1000) * 5000  # views of the whole prompt, until the next token
    assert cache_bytes(WINDOWED, replace(text, chunk=512)) == 400 * 5000 + 1000 * (2000 + 512)
    assert cache_bytes(WINDOWED, Demand(300, 0)) == 1400 * 300
    assert tier_bytes(WINDOWED, replace(text, windows=10)) == 10 * 100 * (2000 + demands.BLOCK_TOKENS)


def test_a_probe_counts_what_windows_show_apart() -> None:
    model = families.build("gemma3", sliding_window=20).to("meta")
    found, wide = run_probe(model), run_probe(families.build("gemma3", sliding_window=10**6).to("meta"))
    layer = 2 * 2 * 16 * 4
    assert (found.cache_token_bytes, found.growing_layers) == (layer, 1)
    assert found.windows == Windows(6, 20, 6 * layer)
    assert wide.windows == Windows(6, 10**6, 6 * layer)
    assert found.layers.token <= wide.layers.token + 3 * layer  # what lies behind windows is no activation
