"""The queue between the reader and the model: order learned, slots bounded, errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rabbit_engine.errors import DamagedShardError, ModelClosedError, StreamingError
from rabbit_engine.streaming import Streamer, Unit, make_unit
from rabbit_engine.streaming.slots import HostSlots
from rabbit_engine.tensorfiles import TensorEntry, read_header, write_aligned

UNITS = 5


class CountingSlots(HostSlots):
    """Counts fills and refuses to fill a slot that is in use."""

    def __init__(self, count: int, nbytes: int) -> None:
        super().__init__(count, nbytes)
        self.filled: list[str] = []
        self.busy: set[int] = set()

    def fill(self, index: int, unit: Unit) -> None:
        assert index not in self.busy
        self.filled.append(unit.name)
        super().fill(index, unit)

    def wait(self, index: int) -> torch.Tensor:
        self.busy.add(index)
        return super().wait(index)

    def free(self, index: int) -> None:
        self.busy.discard(index)


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> list[Unit]:
    folder = tmp_path_factory.mktemp("units")
    made = []
    for i in range(UNITS):
        path = folder / f"u{i}.safetensors"
        write_aligned(path, {"weight": torch.full((3000,), float(i)), "bias": torch.full((7,), i + 0.5)}, {})
        entries = [t for t in read_header(path, DamagedShardError).tensors if not t.name.startswith("__pad__")]
        made.append(make_unit(f"u{i}", entries))
    return made


@pytest.fixture
def streamer(units: list[Unit]) -> Iterator[Streamer]:
    made = Streamer(units, CountingSlots(2, max(u.nbytes for u in units)), 2)
    yield made
    made.close()


def use(streamer: Streamer, units: list[Unit], index: int) -> None:
    _, slot = streamer.acquire(f"u{index}")
    weight, bias = (piece.view(slot) for piece in sorted(units[index].pieces, key=lambda p: p.entry.name, reverse=True))
    assert torch.equal(weight, torch.full((3000,), float(index)))
    assert torch.equal(bias, torch.full((7,), index + 0.5))
    streamer.release(f"u{index}")


def test_a_unit_is_one_read_of_aligned_weights(units: list[Unit]) -> None:
    assert all(len(unit.extents) == 1 and unit.nbytes % 4096 == 0 for unit in units)
    assert all(piece.slot_offset % 4096 == 0 for unit in units for piece in unit.pieces)


def test_extents_of_two_files_do_not_overlap(units: list[Unit]) -> None:
    entries = [piece.entry for unit in units[:2] for piece in unit.pieces]
    unit = make_unit("both", entries)
    assert len(unit.extents) == 2
    first, second = unit.extents
    assert second.slot_offset >= first.slot_offset + first.nbytes


def test_a_cyclic_pass_reads_each_unit_once_and_wastes_nothing(streamer: Streamer, units: list[Unit]) -> None:
    for _ in range(4):
        for index in range(UNITS):
            use(streamer, units, index)
    assert streamer.profile().units <= 4 * UNITS + 2


def test_another_order_is_learned(streamer: Streamer, units: list[Unit]) -> None:
    order = [0, 3, 1]
    for _ in range(10):
        for index in order:
            use(streamer, units, index)
    filled = streamer._slots.filled[-15:]  # type: ignore[attr-defined]
    assert set(filled) == {"u0", "u3", "u1"}


@settings(max_examples=40, deadline=None)
@given(order=st.lists(st.integers(0, UNITS - 1), max_size=40), prefetching=st.booleans())
def test_any_order_gives_the_right_weights(units: list[Unit], order: list[int], prefetching: bool) -> None:
    made = Streamer(units, CountingSlots(2, max(u.nbytes for u in units)), 2, prefetching=prefetching)
    try:
        for index in order:
            use(made, units, index)
        if not prefetching:
            assert made.profile().units == len(order)
    finally:
        made.close()


def test_held_twice_is_read_once_and_released_last(streamer: Streamer) -> None:
    first, second = streamer.acquire("u1"), streamer.acquire("u1")
    assert first[0] == second[0]
    assert not streamer.release("u1")
    assert streamer.held == ("u1",)
    assert streamer.release("u1")
    assert not streamer.release("u1")


def test_more_units_at_once_than_slots_is_an_error_not_a_deadlock(streamer: Streamer) -> None:
    streamer.acquire("u0")
    streamer.acquire("u3")
    with pytest.raises(StreamingError, match="u1 is asked for inside u0 and u3"):
        streamer.acquire("u1")
    streamer.release_all()
    assert streamer.held == ()


def test_an_error_lives_where_it_is_asked_for_and_is_tried_again(units: list[Unit], tmp_path: Path) -> None:
    entry = units[1].pieces[0].entry
    gone = make_unit("gone", [TensorEntry("w", tmp_path / "gone", 0, entry.nbytes, entry.dtype, entry.shape)])
    streamer = Streamer([units[0], gone], CountingSlots(2, max(units[0].nbytes, gone.nbytes)), 2)
    try:
        for _ in range(2):
            use(streamer, units, 0)
            with pytest.raises(FileNotFoundError):
                streamer.acquire("gone")
            assert streamer.held == ()
        (tmp_path / "whole").write_bytes(b"\1" * entry.nbytes)
        (tmp_path / "whole").rename(tmp_path / "gone")  # at once: the reader may be looking
        use(streamer, units, 0)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:  # an old error may be waiting; the next try is right
            try:
                streamer.acquire("gone")
                break
            except FileNotFoundError:
                continue
        assert streamer.held == ("gone",)
    finally:
        streamer.close()


def test_close_wakes_who_waits_and_ends_the_thread(units: list[Unit]) -> None:
    slots = CountingSlots(2, units[0].nbytes)
    entered, go = threading.Event(), threading.Event()

    def slow(index: int, unit: Unit) -> None:
        entered.set()
        go.wait(10)

    slots.fill = slow  # type: ignore[method-assign]
    streamer = Streamer(units, slots, 2)
    seen: list[BaseException] = []

    def ask() -> None:
        try:
            streamer.acquire("u0")
        except ModelClosedError as error:
            seen.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    entered.wait(10)
    closer = threading.Thread(target=streamer.close)
    closer.start()
    go.set()
    closer.join(10)
    asker.join(10)
    assert len(seen) == 1
    assert not closer.is_alive()
    with pytest.raises(ModelClosedError):
        streamer.acquire("u0")
