"""Layers with windows whose keys and values lie in blocks elsewhere, compared with transformers' DynamicSlidingWindowLayer."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tiered_caches import require_equal, states, update
from transformers import Gemma2Config
from transformers.cache_utils import DynamicCache

from rabbit_engine.streaming.caches.states import BlockHome, TextStates
from rabbit_engine.transformers_bridge.caches import ability_of, copy_states, is_made_for, keep, restore_states, windows_of
from rabbit_engine.transformers_bridge.tiered import TieredCache
from rabbit_engine.transformers_bridge.tiered_layers import TieredWindowLayer

LAYERS, WINDOW, BLOCK = 4, 23, 4
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
CONFIG = Gemma2Config(num_hidden_layers=LAYERS, sliding_window=WINDOW, layer_types=KINDS)


def pair(folder: Path | None, which: Any = range(LAYERS)) -> tuple[TieredCache, DynamicCache]:
    return TieredCache(CONFIG, which, TextStates(BlockHome(folder, BLOCK))), DynamicCache(config=CONFIG)


def blocks(cache: TieredCache, index: int = 0) -> int:
    cache.text.end_turn_before(None)
    return len(cache.layers[index].states._blocks)


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize("which", [range(LAYERS), (0, 2)])
def test_only_the_window_moves(tmp_path: Path, place: str, which: Any) -> None:
    ours, theirs = caches = pair(tmp_path if place == "disk" else None, which)
    assert is_made_for(ours, CONFIG)
    assert windows_of(ours) == windows_of(theirs)
    for tokens in (9, 11, 1, 1, 60, 1, 1, 1, 30, 1):
        update(caches, 2, tokens)
        assert blocks(ours) <= -(-WINDOW // BLOCK)
    require_equal(ours, theirs)
    before = ours.text.bytes_read, ours.text.bytes_written
    for _ in range(4 * BLOCK):
        update(caches, 2, 1)
    moved = [now - then for now, then in zip((ours.text.bytes_read, ours.text.bytes_written), before, strict=True)]
    if place == "memory":
        assert moved == [0, 0]
        return
    windows = sum(isinstance(layer, TieredWindowLayer) for layer in ours.layers)
    token = 2 * 2 * (8 + 4) * 4
    assert moved[1] - 4 * BLOCK * token * (len(which) - windows) <= (4 + 1) * BLOCK * token * windows
    if windows == len(which):
        assert moved[0] <= 4 * BLOCK * WINDOW * token * (windows + 1)


def test_a_long_prompt_writes_its_window_alone(tmp_path: Path) -> None:
    ours, theirs = caches = pair(tmp_path, (0, 2, 3))
    update(caches, 1, 400)
    require_equal(ours, theirs)
    assert 0 < ours.text.file_bytes <= 2**22 * 3  # a room of the file for each layer
    assert 0 < ours.text.bytes_written <= 3 * (WINDOW + BLOCK) * 2 * (8 + 4) * 4


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


class Operations:
    """Random ones on two caches, of `rows` rows. `pending` tokens can be taken back."""

    def __init__(self, caches: tuple[TieredCache, DynamicCache], seed: int) -> None:
        self.caches, self.draw, self.rows, self.pending, self.records = caches, random.Random(seed), 2, 0, False

    def grow(self) -> None:
        tokens = self.draw.choice((1, 1, 1, 5, 17))
        update(self.caches, self.rows, tokens)
        self.pending += tokens
        assert [ability_of(cache) for cache in self.caches] == ["select", "select"]

    def crop(self) -> None:
        length = self.caches[1].get_seq_length()
        if self.records or length < WINDOW:
            count = self.draw.randint(0, min(length - 1, self.pending))
            for cache in self.caches:
                cache.crop(-count)
            self.pending = 0

    def keep(self) -> None:
        if self.records:
            offsets = sorted(self.draw.sample(range(self.pending), self.draw.randint(0, self.pending)))
            past = self.caches[1].get_seq_length() - self.pending
            for cache in self.caches:
                keep(cache, past, offsets)
            self.pending = 0

    def record(self) -> None:
        if not self.records:
            for cache in self.caches:
                cache.activate_past_recording()
            self.pending, self.records = 0, True

    def reorder(self) -> None:
        order = torch.tensor([self.draw.randrange(self.rows) for _ in range(self.rows)])
        for cache in self.caches:
            cache.reorder_cache(order)

    def repeat(self) -> None:
        if self.rows < 5:
            for cache in self.caches:
                cache.batch_repeat_interleave(2)
            self.rows *= 2

    def select(self) -> None:
        kept = torch.tensor(sorted(self.draw.sample(range(self.rows), self.draw.randint(1, self.rows))))
        for cache in self.caches:
            cache.batch_select_indices(kept)
        self.rows = len(kept)

    def copy(self) -> None:
        self.caches = (copy.deepcopy(self.caches[0]), copy.deepcopy(self.caches[1]))

    def undo(self) -> None:
        saved = [copy_states(cache) for cache in self.caches]
        update(self.caches, self.rows, 30)
        for cache, before in zip(self.caches, saved, strict=True):
            restore_states(cache, before)

    def compare(self) -> None:
        require_equal(*self.caches)


@pytest.mark.parametrize("seed", range(8))
def test_every_operation_at_random(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    does = Operations(pair(tmp_path), seed)
    some = [does.grow, does.grow, does.grow, does.crop, does.keep, does.reorder, does.repeat, does.select, does.copy, does.undo]
    does.grow()
    for at in range(60):
        does.draw.choice(some)()
        if at == 25:
            does.record()
        if at % 6 == 0:
            does.compare()
    ours, _ = does.caches
    ours.reset()
    for layer in ours.layers:
        layer.record_past = False
    does.caches, does.rows = (ours, DynamicCache(config=CONFIG)), 1  # old releases fill a cache with zeros
    update(does.caches, 1, 39)
    does.compare()


def test_it_refuses_what_transformers_layer_refuses(tmp_path: Path) -> None:
    for tokens in (5, WINDOW + 9):
        caches = pair(tmp_path, (0, 2, 3))
        update(caches, 1, tokens)
        for count in (-2, 0, 3):
            ours, theirs = (outcome(lambda cache=cache: cache.layers[0].crop(count)) for cache in caches)  # noqa: B023
            assert ours == theirs
        require_equal(*caches)
    assert "track past states" in theirs


def test_space_of_what_left_the_window_is_used_again(tmp_path: Path) -> None:
    ours, _ = pair(tmp_path, (0, 2, 3))
    sizes = []
    for _ in range(6):
        for _ in range(20):
            for index in range(LAYERS):
                ours.update(*states(1, 3), index)
        sizes.append(ours.text.file_bytes)
    assert sizes[-1] == sizes[2] > 0
    assert list(tmp_path.iterdir()) == []


def test_views_of_a_pass_stay_as_they_are(tmp_path: Path) -> None:
    ours, _ = pair(tmp_path)
    kept = []
    for _ in range(12):
        for index in range(LAYERS):
            keys, values = ours.update(*states(1, 5), index)
            kept.append((keys, keys.clone(), values, values.clone()))
    for keys, were, values, had in kept:
        assert torch.equal(keys, were)
        assert torch.equal(values, had)


def test_a_pickled_window_is_a_plain_one(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    update((ours, theirs), 2, 60)
    update((ours, theirs), 2, 1)
    found = pickle.loads(pickle.dumps(ours))
    assert [type(layer) for layer in found.layers] == [type(layer) for layer in theirs.layers]
    update((found, theirs), 2, 3)
    assert found.get_seq_length() == 64


def test_a_prompt_in_parts_keeps_its_window_alone_in_memory(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path, (0, 2, 3))
    for index in range(LAYERS):
        for _ in range(20):
            given = states(1, 30)
            for found, wanted in zip(ours.update(*given, index), theirs.update(*given, index), strict=True):
                assert torch.equal(found, wanted)
        if index != 1:
            assert ours.layers[index].states._whole.capacity <= 2 * (WINDOW + 30)
    require_equal(ours, theirs)
