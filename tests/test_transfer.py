"""The queue between the reader and the model: order learned, slots bounded, errors where they belong."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupting import interrupt_at
from waiting import wait_until

from rabbit_engine.errors import ModelClosedError, StreamingError
from rabbit_engine.storage import directio
from rabbit_engine.storage.tensorfiles import read_header, write_aligned
from rabbit_engine.streaming import HostPlace, Trace, Transfer, Unit, make_unit
from rabbit_engine.streaming.transfer.plain_ring import PlainRing
from rabbit_engine.streaming.transfer.reader import Reader, shared_reader
from rabbit_engine.streaming.transfer.ring import READERS
from rabbit_engine.streaming.transfer.unit import Extent

UNITS = 5


class CountingRing(PlainRing):
    """Counts the units filled, and refuses to fill bytes that are in use, or that are being filled."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(torch.device("cpu"), nbytes, Trace())
        self.filled: list[str] = []
        self.busy: set[int] = set()
        self.filling: set[int] = set()
        self.faults: list[str] = []
        self.delay = 0.0
        self.fail: Callable[[str], Exception | None] = lambda _: None

    def fill(self, chunk: Extent, start: int, after: Any, name: str, lane: int) -> None:
        if start in self.busy or start in self.filling:
            self.faults.append(name)
        self.filled.append(name)
        self.filling.add(start)
        try:
            time.sleep(self.delay)
            error = self.fail(name)
            if error is not None:
                raise error
            super().fill(chunk, start, after, name, lane)
        finally:
            self.filling.discard(start)


def ring_of(units: list[Unit], count: int = 2) -> CountingRing:
    return CountingRing(count * max(unit.nbytes for unit in units))


def transfer_of(units: list[Unit], ring: CountingRing, **keywords: Any) -> Transfer:
    return Transfer(units, ring, ring.view(0, 10**9).nbytes, **keywords)


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> list[Unit]:
    folder = tmp_path_factory.mktemp("units")
    made = []
    for i in range(UNITS):
        path = folder / f"u{i}.safetensors"
        write_aligned(path, {"weight": torch.full((3000,), float(i)), "bias": torch.full((7,), i + 0.5)}, {})
        entries = [t for t in read_header(path).tensors if not t.name.startswith("__pad__")]
        made.append(make_unit(f"u{i}", entries))
    return made


@pytest.fixture
def ring(units: list[Unit]) -> CountingRing:
    return ring_of(units)


@pytest.fixture
def transfer(units: list[Unit], ring: CountingRing) -> Iterator[Transfer]:
    made = transfer_of(units, ring)
    yield made
    made.close()
    assert ring.faults == []


def use(transfer: Transfer, ring: CountingRing, units: list[Unit], index: int) -> None:
    place, memory = transfer.acquire(f"u{index}")
    ring.busy.add(place)
    by_name = {weight.entry.name: weight.view(memory) for weight in units[index].weights}
    assert torch.equal(by_name["weight"], torch.full((3000,), float(index)))
    assert torch.equal(by_name["bias"], torch.full((7,), index + 0.5))
    ring.busy.discard(place)
    transfer.release(f"u{index}")


def test_a_unit_is_one_read_of_aligned_weights(units: list[Unit]) -> None:
    assert all(len(unit.extents) == 1 and unit.nbytes % 4096 == 0 for unit in units)
    assert all(weight.places[0] % 4096 == 0 for unit in units for weight in unit.weights)
    assert all(extent.in_pages for unit in units for extent in unit.extents)


def test_extents_of_two_files_do_not_overlap(units: list[Unit]) -> None:
    entries = [weight.entry for unit in units[:2] for weight in unit.weights]
    unit = make_unit("both", entries)
    assert len(unit.extents) == 2
    first, second = unit.extents
    assert second.place >= first.place + first.nbytes


def test_a_cyclic_pass_reads_each_unit_once_and_wastes_nothing(transfer: Transfer, units: list[Unit], ring: CountingRing) -> None:
    for _ in range(4):
        for index in range(UNITS):
            use(transfer, ring, units, index)
    assert len(ring.filled) <= 4 * UNITS + 2
    assert transfer.profile().loads == 4 * UNITS


def test_another_order_is_learned(transfer: Transfer, units: list[Unit], ring: CountingRing) -> None:
    order = [0, 3, 1]
    for _ in range(10):
        for index in order:
            use(transfer, ring, units, index)
    assert set(ring.filled[-15:]) == {"u0", "u3", "u1"}


@settings(max_examples=40, deadline=None)
@given(order=st.lists(st.integers(0, UNITS - 1), max_size=40), prefetching=st.booleans(), count=st.integers(1, 4))
def test_any_order_gives_the_right_weights(units: list[Unit], order: list[int], prefetching: bool, count: int) -> None:
    ring = ring_of(units, count)
    made = transfer_of(units, ring, prefetching=prefetching)
    try:
        for index in order:
            use(made, ring, units, index)
        if not prefetching:
            assert len(ring.filled) == len(order)
    finally:
        made.close()


def test_held_twice_is_read_once_and_released_last(transfer: Transfer) -> None:
    first, second = transfer.acquire("u1"), transfer.acquire("u1")
    assert first[0] == second[0]
    assert not transfer.release("u1")
    assert transfer.held == ("u1",)
    assert transfer.release("u1")
    assert not transfer.release("u1")


def test_more_units_at_once_than_slots_is_an_error_not_a_deadlock(transfer: Transfer) -> None:
    transfer.acquire("u0")
    transfer.acquire("u3")
    with pytest.raises(StreamingError, match="u1 is requested inside u0 and u3"):
        transfer.acquire("u1")
    transfer.release_all()
    assert transfer.held == ()


def test_an_error_is_raised_where_the_unit_is_requested_and_tried_again(units: list[Unit], ring: CountingRing) -> None:
    broken = True
    ring.fail = lambda name: OSError("no such block") if name == "u1" and broken else None
    transfer = transfer_of(units, ring)
    try:
        for _ in range(3):
            use(transfer, ring, units, 0)
            with pytest.raises(OSError, match="no such block"):
                transfer.acquire("u1")
            assert transfer.held == ()
        broken = False
        for index in (0, 1, 2, 0, 1):
            use(transfer, ring, units, index)
    finally:
        transfer.close()


def test_a_prefetch_that_failed_once_is_tried_again_when_it_matters(units: list[Unit], ring: CountingRing) -> None:
    failed: list[str] = []

    def fail_once(name: str) -> Exception | None:
        if name == "u1" and not failed:
            failed.append(name)
            return OSError("once")
        return None

    ring.fail = fail_once
    transfer = transfer_of(units, ring)
    try:
        use(transfer, ring, units, 0)
        wait_until(lambda: bool(failed))
        for index in (1, 2, 3, 4, 0, 1):
            use(transfer, ring, units, index)
    finally:
        transfer.close()


def test_a_slow_reader_is_waited_for(units: list[Unit], ring: CountingRing) -> None:
    ring.delay = 0.02
    transfer = transfer_of(units, ring)
    try:
        for index in (0, 1, 2, 3, 4, 2, 0):
            use(transfer, ring, units, index)
        assert transfer.profile().wait_s > 0.02
    finally:
        transfer.close()


def test_an_interrupt_at_any_line_hands_no_byte_out_twice(units: list[Unit]) -> None:
    """A unit dropped while it is read, because another was requested out of order, keeps its place until the read has ended."""
    for line in itertools.count(1):
        ring = ring_of(units, 3)
        ring.delay = 0.002
        transfer = transfer_of(units, ring)
        try:
            use(transfer, ring, units, 0)
            wait_until(lambda ring=ring: "u2" in ring.filled)  # u1 is there, u2 is being read
            interrupted = interrupt_at(line, lambda ring=ring, transfer=transfer: use(transfer, ring, units, 4))
            ring.busy.clear()
            transfer.release_all()
            assert transfer.held == ()
            for index in (line % UNITS, 3, 4, 0, 2, 1):
                use(transfer, ring, units, index)
        finally:
            transfer.close()
        assert ring.faults == []
        if not interrupted:
            break
    assert line > 40


def test_a_unit_requested_inside_another_is_an_error_even_if_prefetched(units: list[Unit]) -> None:
    ring = ring_of(units, 1)
    transfer = transfer_of(units, ring)
    try:
        transfer.acquire("u0")
        transfer.wait_until_idle()
        with pytest.raises(StreamingError, match="u1 is requested inside u0"):
            transfer.acquire("u1")
        transfer.release_all()
        use(transfer, ring, units, 1)
    finally:
        transfer.close()


class InterruptedReader(Reader):
    """Leaving it is interrupted the first time."""

    interrupts = 1

    def leave(self, source: Any) -> None:
        self.interrupts -= 1
        if self.interrupts == 0:
            raise KeyboardInterrupt
        super().leave(source)


def test_an_interrupted_close_can_be_repeated(units: list[Unit], ring: CountingRing) -> None:
    ring.delay = 0.05
    host = PlainRing(torch.device("cpu"), units[4].nbytes, Trace())
    transfer = transfer_of(units, ring, host={"u4": HostPlace(host, 0, filled=True)}, reader=InterruptedReader())
    use(transfer, ring, units, 0)
    with pytest.raises(KeyboardInterrupt):
        transfer.close()
    assert ring.view(0, 1).numel() == 1
    transfer.close()
    transfer.close()
    assert ring.view(0, 1).numel() == host.view(0, 1).numel() == 0


@pytest.mark.parametrize("started", [0, 1, 3])
def test_threads_that_cannot_start_leave_nothing_behind(started: int, units: list[Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of this test's own, as another test's model may keep the shared one running."""
    reader, native, starts, before = Reader(), threading.Thread.start, itertools.count(), threading.active_count()

    def start(thread: threading.Thread) -> None:
        if next(starts) == started:
            raise RuntimeError("can't start new thread")
        native(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="new thread"):
        transfer_of(units, ring_of(units), reader=reader)
    assert threading.active_count() == before
    monkeypatch.setattr(threading.Thread, "start", native)
    ring = ring_of(units)
    transfer = transfer_of(units, ring, reader=reader)
    for index in range(UNITS):
        use(transfer, ring, units, index)
    assert threading.active_count() == before + READERS
    transfer.close()
    assert threading.active_count() == before


def test_short_reads_are_read_on(
    units: list[Unit], monkeypatch: pytest.MonkeyPatch, transfer: Transfer, ring: CountingRing
) -> None:
    native = directio.read_into
    asked: list[int] = []

    class Stingy:
        def __init__(self, file: Any) -> None:
            self._file = file

        def readinto(self, buffer: memoryview) -> int:
            asked.append(len(buffer))
            return self._file.readinto(buffer[: max(4096, len(buffer) // 2 // 4096 * 4096)])

    monkeypatch.setattr(directio, "read_into", lambda file, *rest: native(Stingy(file), *rest))
    for index in range(UNITS):
        use(transfer, ring, units, index)
    assert len(asked) > UNITS


class EndlessPrefetch:
    """A source that always has something to prefetch."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def next_job(self, *, wanted: bool) -> Any:
        def job(lane: int) -> Any:
            self.order.append("prefetch")
            time.sleep(0.01)
            return lambda: None

        return None if wanted else job


def test_a_wanted_unit_is_read_before_prefetches(units: list[Unit]) -> None:
    order: list[str] = []
    prefetches = EndlessPrefetch(order)
    reader = shared_reader()
    reader.join(prefetches)
    ring = ring_of(units)
    ring.fail = lambda name: order.append(name)  # type: ignore[func-returns-value, return-value]
    transfer = transfer_of(units, ring, prefetching=False)
    try:
        wait_until(lambda: len(order) > 2 * READERS)
        for index in (3, 0, 2):
            with reader.lock:
                before = len(order)
            use(transfer, ring, units, index)
            assert order[before:].index(f"u{index}") <= READERS  # only what was under way
    finally:
        transfer.close()
        reader.leave(prefetches)


def close_during_a_read(transfer: Transfer, ring: CountingRing) -> tuple[list[Exception], list[int]]:
    """The errors of a thread that waits for u0, and the length of the ring's first byte whenever a read ended."""
    entered, go = threading.Event(), threading.Event()
    seen: list[Exception] = []
    left: list[int] = []

    def slow(*_: Any) -> None:
        entered.set()
        go.wait(10)
        left.append(ring.view(0, 1).numel())

    def ask() -> None:
        try:
            transfer.acquire("u0")
        except ModelClosedError as error:
            seen.append(error)

    ring.fill = slow  # type: ignore[method-assign]
    asker, closer = threading.Thread(target=ask), threading.Thread(target=transfer.close)
    asker.start()
    entered.wait(10)
    closer.start()
    closer.join(0.1)
    go.set()
    for thread in (closer, asker):
        thread.join(10)
        assert not thread.is_alive()
    return seen, left


def test_close_waits_for_its_reads_while_another_model_keeps_the_readers(units: list[Unit], ring: CountingRing) -> None:
    other = transfer_of(units, ring_of(units))
    seen, left = close_during_a_read(transfer_of(units, ring), ring)
    other.close()
    assert len(seen) == 1
    assert set(left) == {1}  # the ring's memory was there until its last read had ended


def test_close_wakes_who_waits_and_ends_the_threads(units: list[Unit], ring: CountingRing) -> None:
    transfer = transfer_of(units, ring)
    seen, _ = close_during_a_read(transfer, ring)
    assert len(seen) == 1
    with pytest.raises(ModelClosedError):
        transfer.acquire("u0")
