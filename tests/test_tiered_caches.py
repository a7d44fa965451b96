"""Caches whose layers lie in blocks elsewhere, compared with transformers' DynamicCache."""

from __future__ import annotations

import copy
import gc
import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from rabbit_engine.caches import FarStates
from rabbit_engine.errors import FarStatesError
from rabbit_engine.storage.scratchfile import ScratchFile
from rabbit_engine.streaming.caches.states import BlockHome, TextStates
from rabbit_engine.transformers_bridge.tiered import TieredCache

LAYERS = 4
CONFIG = LlamaConfig(num_hidden_layers=LAYERS)


def tiered(
    folder: Path | None, block: int, *, which=range(LAYERS), expected: int = 0, piece: int | None = None, encoded: bool = False
) -> TieredCache:
    return TieredCache(CONFIG, which, TextStates(BlockHome(folder, block, piece_tokens=piece, encoded=encoded), expected))


def whole(shown):
    """Keys and values of all tokens, also of those in pieces; twice, as layers that share keys ask for them again."""
    if not isinstance(shown[0], FarStates):
        return shown
    for _ in range(2):
        pieces = [tuple(states.clone() for states in piece) for piece in shown[0].far.blocks()]
    return tuple(torch.cat([*far, near.near], dim=2) for far, near in zip(zip(*pieces, strict=True), shown, strict=True))


def states(rows: int, tokens: int, width: int = 8, dtype: torch.dtype = torch.float32):
    return torch.randn(rows, 2, tokens, width, dtype=dtype), torch.randn(rows, 2, tokens, width // 2, dtype=dtype)


def update(caches, rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    """A pass over all layers: both show the same."""
    for index in range(LAYERS):
        keys, values = states(rows, tokens, dtype=dtype)
        shown = [whole(cache.update(keys, values, index)) for cache in caches]
        for found, wanted in zip(*shown, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def require_equal(ours: TieredCache, theirs: DynamicCache) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, its in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, its.keys)
        assert torch.equal(mine.values, its.values)
        assert mine.get_mask_sizes(3) == its.get_mask_sizes(3)


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize("which", [range(LAYERS), (1, 3)])
@pytest.mark.parametrize(("block", "piece"), [(1, None), (4, None), (16, None), (1, 3), (4, 4), (4, 12)])
def test_shows_what_a_dynamic_cache_shows(tmp_path: Path, place: str, which, block: int, piece: int | None) -> None:
    ours, theirs = tiered(tmp_path if place == "disk" else None, block, which=which, piece=piece), DynamicCache(config=CONFIG)
    for tokens in (33, 1, 1, 7, 1, 40, 1):
        update((ours, theirs), 2, tokens)
    require_equal(ours, theirs)
    assert (ours.text.bytes_written > 0) == (ours.text.bytes_read > 0) == (place == "disk")


@pytest.mark.parametrize("piece", [None, 12])
@pytest.mark.parametrize("seed", range(6))
def test_every_operation_at_random(tmp_path: Path, seed: int, piece: int | None) -> None:
    draw, rows = random.Random(seed), 2
    torch.manual_seed(seed)
    ours, theirs = tiered(tmp_path, 4, piece=piece), DynamicCache(config=CONFIG)
    update((ours, theirs), rows, draw.randint(1, 40))
    for _ in range(40):
        match draw.randrange(8):
            case 0:
                count = draw.randint(0, theirs.get_seq_length() - 1)
                ours.crop(-count), theirs.crop(-count)
            case 1:
                order = torch.tensor([draw.randrange(rows) for _ in range(rows)])
                ours.reorder_cache(order), theirs.reorder_cache(order)
            case 2 if rows < 5:
                ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
                rows *= 2
            case 3:
                kept = torch.tensor(sorted(draw.sample(range(rows), draw.randint(1, rows))))
                ours.batch_select_indices(kept), theirs.batch_select_indices(kept)
                rows = len(kept)
            case 4:
                ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
            case 5:
                require_equal(ours, theirs)
            case _:
                update((ours, theirs), rows, draw.choice((1, 1, 1, 5, 17)))
    require_equal(ours, theirs)
    ours.reset()
    theirs = DynamicCache(config=CONFIG)  # old releases fill a cache with zeros
    assert ours.get_seq_length() == 0
    update((ours, theirs), 1, 9)
    require_equal(ours, theirs)


def test_a_fork_shares_blocks_and_goes_on_alone(tmp_path: Path) -> None:
    first = tiered(tmp_path, 4)
    for index in range(LAYERS):
        first.update(*states(1, 50), index)
    copied = DynamicCache(config=CONFIG)
    for index, layer in enumerate(first.layers):
        copied.update(layer.keys, layer.values, index)
    second, other = copy.deepcopy(first), copy.deepcopy(copied)
    shared = [[block.stored for block in cache.layers[1].states._blocks] for cache in (first, second)]
    assert shared[0] == shared[1] != []
    update((first, copied), 1, 3)
    update((second, other), 1, 20)
    require_equal(first, copied)
    del first, copied
    gc.collect()
    require_equal(second, other)


def test_views_of_a_pass_stay_as_they_are(tmp_path: Path) -> None:
    """Layers that share keys read those of an earlier layer while later ones run."""
    ours = tiered(tmp_path, 4)
    kept = []
    for _ in range(6):
        for index in range(LAYERS):
            keys, values = ours.update(*states(1, 5), index)
            kept.append((keys, keys.clone(), values, values.clone()))
    for keys, were, values, had in kept:
        assert torch.equal(keys, were)
        assert torch.equal(values, had)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_whole_pages_go_past_the_page_cache(tmp_path: Path, dtype: torch.dtype) -> None:
    ours, theirs = tiered(tmp_path, 1024), DynamicCache(config=CONFIG)
    for tokens in (5000, 1, 1200, 1):
        update((ours, theirs), 1, tokens, dtype)
    require_equal(ours, theirs)
    assert ours.text.bytes_read > ours.text.bytes_written > 0


def test_a_layer_is_read_as_one_though_layers_grow_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiered(tmp_path, 128)
    for _ in range(6):
        for index in range(LAYERS):
            cache.update(*states(1, 128), index)
    reads = []
    read = ScratchFile.read

    def noted(self: ScratchFile, offset: int, buffers: Sequence[memoryview]) -> None:
        reads.append(len(buffers))
        read(self, offset, buffers)

    monkeypatch.setattr(ScratchFile, "read", noted)
    cache.layers[0].states.part(0, 4 * 128)
    assert set(reads) <= {5 * 2 * 2, 4 * 2 * 2}  # blocks (all are read ahead), keys and values, heads


def test_pieces_are_read_once_each_and_ahead(tmp_path: Path) -> None:
    cache = tiered(tmp_path, 64, piece=128)
    for index in range(LAYERS):
        cache.update(*states(1, 64 * 9), index)
    for index in range(LAYERS):
        whole(cache.update(*states(1, 1), index))  # twice
    block = 2 * 64 * (8 + 4) * 4
    assert cache.text.bytes_read in {LAYERS * 2 * 8 * block, (LAYERS * 2 * 8 + 2) * block}  # and the first piece of the next pass


def test_pieces_of_eight_bits_show_what_whole_layers_do(tmp_path: Path) -> None:
    caches = [tiered(tmp_path, 4, piece=piece, encoded=True) for piece in (None, 12)]
    for tokens in (33, 1, 7, 1):
        for index in range(LAYERS):
            keys, values = states(2, tokens)
            for cache in caches:
                cache.update(keys, values, index)
    require_equal(*caches)
    for index in range(LAYERS):  # a whole layer has its new tokens as they were computed, until its turn ends
        shown = whole(caches[1].update(*states(2, 1), index))
        for found, wanted in zip(shown, caches[1].layers[index].states.all(), strict=True):
            assert torch.equal(found, wanted)


def test_pieces_that_attention_leaves_are_dropped(tmp_path: Path) -> None:
    cache = tiered(tmp_path, 4, piece=4)
    for index in range(LAYERS):
        keys, _ = cache.update(*states(1, 40), index)
    left = keys.far.blocks()
    next(left)
    left.close()
    assert [len(list(cache.update(*states(1, 1), index)[0].far.blocks())) for index in range(LAYERS)] == [9] * LAYERS
    with pytest.raises(FarStatesError):
        keys + 1


def test_beams_do_not_read_again_what_was_read_ahead(tmp_path: Path) -> None:
    ours, theirs = tiered(tmp_path, 4), DynamicCache(config=CONFIG)
    update((ours, theirs), 3, 40)
    reads = []
    for order in ([1, 0, 0], [1, 2, 0], [2, 2, 1]):
        update((ours, theirs), 3, 1)
        ours.text.mover.wait(ours.layers[0].states._ahead)
        reads.append(ours.text.bytes_read)
        for each in (ours, theirs):
            for _ in range(2):
                each.reorder_cache(torch.tensor(order))
    assert 0 < reads[2] - reads[1] <= ours.text.bytes_written
    require_equal(ours, theirs)


def test_a_pickled_cache_is_a_plain_one(tmp_path: Path) -> None:
    ours, theirs = tiered(tmp_path, 4, which=(0, 2, 3)), DynamicCache(config=CONFIG)
    update((ours, theirs), 2, 30)
    found = pickle.loads(pickle.dumps(ours))
    assert type(found) is DynamicCache
    assert [type(layer) for layer in found.layers] == [type(layer) for layer in theirs.layers]
    update((found, theirs), 2, 3)
    assert copy.copy(ours).layers[0] is ours.layers[0]
    assert pickle.loads(pickle.dumps(tiered(tmp_path, 4))).get_seq_length() == 0


def test_space_of_dropped_blocks_is_used_again(tmp_path: Path) -> None:
    home = BlockHome(tmp_path, 4)
    ours = TieredCache(CONFIG, range(LAYERS), TextStates(home))
    sizes = []
    for _ in range(5):
        for _ in range(3):
            for index in range(LAYERS):
                ours.update(*states(1, 20), index)
        sizes.append(home.file_bytes)
        ours.crop(-60)
        gc.collect()
    assert 0 < sizes[-1] < 2.5 * sizes[0]
    assert list(tmp_path.iterdir()) == []  # the file has no name
