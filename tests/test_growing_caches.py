"""Layers with room for more tokens: transformers' own bits, and copies that never see each other's tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rabbit_engine.transformers_bridge import caches
from rabbit_engine.transformers_bridge.growing import GrowingLayer, growing_cache

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")


def states(tokens: int, rows: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, 8, generator=generator), torch.randn(rows, 2, tokens, 4, generator=generator)


def both(soon: int = 10, most: int = 600) -> tuple[GrowingLayer, Any]:
    return GrowingLayer(soon, most), DynamicLayer()


def same(one: Any, other: Any) -> bool:
    shapes = one.get_seq_length() == other.get_seq_length()
    return shapes and bool(one.keys.equal(other.keys)) and bool(one.values.equal(other.values))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "crop": lambda layer: layer.crop(-3),
    "crop all": lambda layer: layer.crop(-10),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([True, False])),
    "reset": lambda layer: layer.reset(),
    "assign": lambda layer: [setattr(layer, name, getattr(layer, name)[:, :, 2:7] * 2) for name in ("keys", "values")],
    "inference": lambda layer: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_does_what_transformers_layer_does(change: str) -> None:
    found = both()
    for layer in found:
        with torch.inference_mode(mode=change == "inference"):
            layer.update(*states(10, 2))
        CHANGES[change](layer)
    if change == "reset":
        found = (found[0], DynamicLayer())  # old releases fill their tokens with zeros, and keep them
    for layer in found:
        rows = len(layer.keys) if layer.get_seq_length() else 2
        for seed, tokens in enumerate((1, 4, 300, 1)):
            shown = layer.update(*states(tokens, rows, seed))
            assert shown[0] is layer.keys
    assert same(*found)


def test_tokens_are_added_in_place_as_long_as_there_is_room() -> None:
    layer = GrowingLayer(soon=100, most=400)
    places, lengths = [], []
    for _ in range(50):
        layer.update(*states(10))
        assert layer.keys is not None
        places.append(layer.keys.data_ptr())
        lengths.append(layer.keys.untyped_storage().nbytes() // (2 * 8 * 4))
    assert (len(set(places[:35])), lengths[0]) == (1, 384)  # room for 256 more than come soon, in multiples of 64
    assert max(lengths[:39]) <= 448  # never for more than `most` asks
    assert lengths[-1] >= 500


def test_copies_share_what_is_there_and_no_more() -> None:
    cache = growing_cache(families.build("llama").config, 8, 64)
    plain = DynamicCache(config=families.build("llama").config)
    for each in (cache, plain):
        for index in range(len(each.layers)):
            each.update(*states(8, seed=index), index)
    shared = caches.copy_to_continue(cache, 64)
    copied = copy.deepcopy(cache)
    expected = copy.deepcopy(plain)
    assert shared.layers[0].keys is cache.layers[0].keys
    assert copied.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()
    for each in (cache, plain):
        each.crop(-3)
        each.update(*states(3, seed=9), 0)
    for each in (shared, copied, expected):
        each.update(*states(2, seed=7), 0)
    assert same(cache.layers[0], plain.layers[0])
    assert same(shared.layers[0], expected.layers[0])
    assert same(copied.layers[0], expected.layers[0])
    assert same(shared.layers[1], expected.layers[1])


def test_what_was_saved_comes_back() -> None:
    cache = growing_cache(families.build("llama").config, 8, 64)
    cache.update(*states(8), 0)
    saved, keys = caches.copy_states(cache), cache.layers[0].keys.clone()
    cache.update(*states(3, seed=2), 0)
    caches.restore_states(cache, saved)
    assert cache.layers[0].keys.equal(keys)
    cache.update(*states(1, seed=3), 0)
    assert cache.layers[0].keys.equal(torch.cat([keys, states(1, seed=3)[0]], dim=2))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3n", "mistral", "gpt2", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_families_compute_the_same_bits(family: str, attention: str) -> None:
    model = families.build(family)
    model.set_attn_implementation(attention)
    ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(5))
    outputs = []
    for cache in (DynamicCache(config=model.config), growing_cache(model.config, 20, 50)):
        with torch.inference_mode():
            passes = [model(part, use_cache=True, past_key_values=cache).logits for part in ids.split([20, 11, 1, 1, 7], dim=1)]
        outputs.append(torch.cat(passes, dim=1))
        assert caches.is_made_for(cache, model.config)
    assert outputs[0].equal(outputs[1])
