"""Caches that go back to a saved moment and forward to a later one, as the trial of a new class does amid its first answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from long_texts import answer, have_all_in_tiers, made_caches, prompt
from transformers import Gemma2Config
from transformers.cache_utils import DynamicCache

from rabbit_engine.decoding.findings import Findings
from rabbit_engine.decoding.lookup import Lookup
from rabbit_engine.model.tiered_caches import make_growing_cache
from rabbit_engine.streaming.caches.states import BlockHome, TextStates
from rabbit_engine.transformers_bridge.caches import copy_states, restore_states
from rabbit_engine.transformers_bridge.growing import growing_cache
from rabbit_engine.transformers_bridge.tiered import TieredCache

LAYERS = 3
CONFIG = Gemma2Config(
    num_hidden_layers=LAYERS, sliding_window=23, layer_types=["full_attention", "sliding_attention", "full_attention"]
)


def made(kind: str, folder: Path) -> DynamicCache:
    if kind == "growing":
        return growing_cache(CONFIG, 20, 100)
    return TieredCache(CONFIG, range(LAYERS), TextStates(BlockHome(folder, 4, piece_tokens=12 if kind == "pieces" else None)))


def grow(caches: tuple[Any, ...], tokens: int) -> None:
    for index in range(LAYERS):
        keys, values = torch.randn(2, 2, tokens, 8), torch.randn(2, 2, tokens, 8)
        for cache in caches:
            cache.update(keys, values, index)


@pytest.mark.parametrize("first", [0, 5, 33])
@pytest.mark.parametrize("kind", ["growing", "tiers", "pieces"])
def test_a_later_moment_comes_back_after_an_earlier_one(tmp_path: Path, kind: str, first: int) -> None:
    caches = made(kind, tmp_path), DynamicCache(config=CONFIG)
    if first:
        grow(caches, first)
    before = [copy_states(cache) for cache in caches]
    for _ in range(9):
        grow(caches, 1)
    now = [copy_states(cache) for cache in caches]
    for moments, tokens in ((before, 7), (now, 1), (now, 30)):
        for cache, moment in zip(caches, moments, strict=True):
            restore_states(cache, moment)
        if moments is before:
            grow(caches, tokens)
    grow(caches, 2)
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == first + 11
        assert ours.keys.equal(theirs.keys)
        assert ours.values.equal(theirs.values)


@pytest.mark.parametrize("kind", ["growing", "tiers", "pieces"])
def test_the_trial_of_a_class_leaves_its_first_answer_as_it_is(
    checkpoint: Any, tmp_path: Path, streamed: Any, plain: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = checkpoint("llama")
    monkeypatch.setattr(Findings, "recorded", classmethod(lambda cls, _: cls()))
    ids = torch.cat([prompt(17), prompt(17), prompt(9)], dim=1)
    with made_caches(monkeypatch, tmp_path) as caches:
        if kind == "growing":
            monkeypatch.setattr("rabbit_engine.model.mixin.make_cache", make_growing_cache)
        else:
            have_all_in_tiers(monkeypatch, pieces=kind == "pieces")
        model = streamed(folder)
        found, expected = answer(model, ids, speculate=Lookup(nodes=2)), answer(plain(folder), ids)
        assert kind == "growing" or len(caches) == 1
    assert found.sequences.equal(expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
