"""Where the bytes of units are: weights on boundaries, blocks of rows, and an arena that hands out no byte twice."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from rabbit_engine.storage.tensorfiles import read_header, read_tensor, write_aligned
from rabbit_engine.streaming import Trace, fill_all, make_unit, row_blocks
from rabbit_engine.streaming.transfer.arena import Arena
from rabbit_engine.streaming.transfer.plain_ring import PlainRing


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60), nbytes=st.integers(50, 200), seed=st.randoms())
def test_the_arena_never_hands_out_a_byte_twice(sizes: list[int], nbytes: int, seed: random.Random) -> None:
    arena, taken = Arena(nbytes), dict[int, int]()
    for size in sizes:
        place = arena.take(size)
        if place is None:
            assert taken, "an empty arena has room for anything up to its size"
            gone = seed.choice(sorted(taken))
            arena.give(gone)
            del taken[gone]
            continue
        taken[place] = size
        spans = sorted((start, start + length) for start, length in taken.items())
        assert spans[-1][1] <= nbytes
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_weights_off_a_boundary_are_moved_onto_one(tmp_path: Path) -> None:
    """A file as others write it: its header leaves the data at 8 modulo 16, and neighbours follow without a gap."""
    path = tmp_path / "odd.safetensors"
    tensors = {"a": torch.arange(40_000.0), "b": torch.arange(30_000.0) + 0.5, "c": torch.arange(3, dtype=torch.int8)}
    raw = save(tensors)
    size = int.from_bytes(raw[:8], "little")
    pad = (8 - (8 + size)) % 16
    path.write_bytes((size + pad).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * pad + raw[8 + size :])
    entries = read_header(path).tensors
    assert all(entry.offset % 16 == 8 for entry in entries)
    unit = make_unit("odd", entries)
    assert all(weight.places[0] % 16 == 0 for weight in unit.weights)
    ring = PlainRing(torch.device("cpu"), unit.nbytes, Trace())
    fill_all(ring, [(unit, 0)])
    for weight in unit.weights:
        view = weight.view(ring.view(0, unit.nbytes))
        assert view.data_ptr() % 16 == 0
        assert torch.equal(view, tensors[weight.entry.name])


@pytest.mark.parametrize("most", [1, 4096, 10_000, 10**9])
def test_row_blocks_are_the_matrix(tmp_path: Path, most: int) -> None:
    path = tmp_path / "m.safetensors"
    matrix = torch.randn(37, 200)
    write_aligned(path, {"m": matrix}, {})
    entry = next(t for t in read_header(path).tensors if t.name == "m")
    blocks = row_blocks(entry, most)
    assert [first for first, _, _ in blocks] == [0, *(stop for _, stop, _ in blocks[:-1])]
    assert blocks[-1][1] == 37
    for first, stop, rows in blocks:
        assert rows.nbytes <= max(most, 800)
        assert torch.equal(read_tensor(rows), matrix[first:stop])
