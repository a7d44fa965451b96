"""The transfer alone on a simulated accelerator: any schedule is right, and no wait can be left out."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from interrupting import interrupt_at
from simulated import Event, RaceError, SimulatedAccelerator, SimulatedHost, SimulatedRing, Stream, Watch

from rabbit_engine.errors import ModelClosedError, StreamingError
from rabbit_engine.storage.tensorfiles import read_header, write_aligned
from rabbit_engine.streaming import ExpertLayer, ExpertSlots, HostPlace, Transfer, Unit, fill_all, make_unit

UNITS, EXPERTS = 24, 12


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> list[Unit]:
    """Of one to five pages, every third from two files; the values of unit `u7` are 7."""
    folder, sizes = tmp_path_factory.mktemp("units"), random.Random(3)
    made = []
    for index in range(UNITS):
        entries = []
        for part in range(2 if index % 3 == 0 else 1):
            path = folder / f"u{index}.{part}.safetensors"
            write_aligned(path, {f"w{part}": torch.full((sizes.randint(5, 2500),), float(index))}, {})
            entries += [entry for entry in read_header(path).tensors if not entry.name.startswith("__pad__")]
        made.append(make_unit(f"u{index}", entries))
    return made


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Unit]:
    """The values of expert `l[7]` are 7."""
    path = tmp_path_factory.mktemp("experts") / "experts.safetensors"
    stacks = {f"l.{name}": torch.arange(float(EXPERTS))[:, None].repeat(1, width) for name, width in (("up", 3000), ("bias", 5))}
    write_aligned(path, stacks, {})
    entries = [entry for entry in read_header(path).tensors if not entry.name.startswith("__pad__")]
    return [make_unit(f"l[{index}]", [entry.rows(index, index + 1) for entry in entries]) for index in range(EXPERTS)]


class FailingRing(SimulatedRing):
    """Reads and copies fail as `fails` says."""

    fails: Callable[[str], bool] = staticmethod(lambda name: False)

    def fill(self, chunk: Any, start: int, after: Any, name: str, lane: int) -> None:
        if self.fails(name):
            raise OSError(f"{name} has a bad sector")
        super().fill(chunk, start, after, name, lane)

    def copy(self, source: torch.Tensor, start: int, after: Any, name: str) -> None:
        if self.fails(name):
            raise OSError(f"{name} cannot be copied")
        super().copy(source, start, after, name)


class Run:
    """A transfer over a separate device: the ring's memory holds residents, slots for experts, and units in transit."""

    def __init__(
        self,
        units: list[Unit],
        experts: list[Unit],
        device: SimulatedAccelerator,
        chance: random.Random,
        *,
        fails: float = 0.0,
        kept: tuple[int, int] | None = None,
    ) -> None:
        self.units, self.experts, self.device, self.chance = units, experts, device, chance
        slot, largest = max(unit.nbytes for unit in experts), max(unit.nbytes for unit in units)
        self.on_device, self.in_host = kept or chance.choice([(0, 0), (3, 0), (0, 3), (2, 4), (5, 7)])
        self.resident, moving = units[:14], units[14:]
        base = sum(unit.nbytes for unit in self.resident)
        count, nbytes = 2 + self.on_device, chance.randint(2, 5) * largest
        self.ring = FailingRing(device, base + count * slot + nbytes)
        lock = threading.Lock()

        def fail(name: str) -> bool:
            with lock:
                return chance.random() < fails

        self._fill_residents()
        self.ring.fails = fail  # type: ignore[method-assign]
        in_host = [unit for unit in moving if chance.random() < 0.3]
        memory = SimulatedHost(device, sum(unit.nbytes for unit in in_host))
        slots_host = SimulatedHost(device, slot * self.in_host) if self.in_host else None
        for each in (memory, slots_host):
            if each is not None:
                self.ring.pin(each.view(0, 10**9))
        starts = list(itertools.accumulate((unit.nbytes for unit in in_host), initial=0))
        fill_all(memory, list(zip(in_host, starts, strict=False)))
        layers = [ExpertLayer("l", experts, 2, self.on_device, self.in_host)]
        self.transfer = Transfer(
            moving,
            self.ring,
            nbytes,
            start=base + count * slot,
            host={unit.name: HostPlace(memory, start, filled=True) for unit, start in zip(in_host, starts, strict=False)},
            slots=ExpertSlots(layers=layers, count=count, nbytes=slot, start=base, host=slots_host),
        )

    def _fill_residents(self) -> None:
        starts = list(itertools.accumulate((unit.nbytes for unit in self.resident), initial=0))
        self.starts = {unit.name: start for unit, start in zip(self.resident, starts, strict=False)}
        fill_all(self.ring, [(unit, self.starts[unit.name]) for unit in self.resident])

    def compute(self, unit: Unit, memory: torch.Tensor) -> None:
        """Kernels that read every weight."""
        expected = float(unit.name.strip("ul[]"))
        for weight in unit.weights:
            assert torch.equal(weight.view(memory), torch.full(weight.entry.shape, expected)), unit.name

    def use_resident(self) -> None:
        unit = self.chance.choice(self.resident)
        self.compute(unit, self.ring.view(self.starts[unit.name], unit.nbytes))

    def use(self, index: int, inside: Callable[[], None] = lambda: None) -> None:
        unit = self.transfer.units[index % len(self.transfer.units)]
        _, memory = self.transfer.acquire(unit.name)
        self.compute(unit, memory)
        inside()
        self.compute(unit, memory)
        self.transfer.release(unit.name)

    def route(self, indices: list[int], leave_after: int = EXPERTS) -> None:
        assert self.transfer.experts is not None
        uses = dict.fromkeys(indices, 1.0)
        with self.transfer.experts.lend("l", uses, self.chance.randint(1, 9)) as arrivals:
            for used, (index, memory) in enumerate(arrivals):
                self.compute(self.experts[index], memory)
                if used == leave_after:
                    raise KeyboardInterrupt

    def step(self, index: int) -> None:
        """Anything that a model may do, and may do wrong."""
        some = self.chance.sample(range(EXPERTS), self.chance.randint(1, 5))
        kind = self.chance.choice(["next", "next", "any", "nested", "experts", "experts", "left", "resident", "stream"])
        if kind == "nested":
            self.use(index, lambda: self.use(self.chance.randrange(UNITS)))
        elif kind == "experts":
            self.route(some)
        elif kind == "left":
            self.use(index, lambda: self.route(some, leave_after=0))
        elif kind == "resident":
            self.use_resident()
        elif kind == "stream":
            with self.device.in_stream():
                self.use(index)
                self.route(some)
        else:
            self.use(index if kind == "next" else self.chance.randrange(UNITS))

    def walk(self, steps: int) -> int:
        """`steps` steps; how many ended early."""
        ended = 0
        for index in range(steps):
            try:
                self.step(index)
            except (KeyboardInterrupt, StreamingError, OSError):
                ended += 1
                self.transfer.release_all()
                assert self.transfer.held == ()
        return ended


def end(transfer: Transfer) -> None:
    with suppress(RaceError):
        transfer.close()


@pytest.fixture
def run(units: list[Unit], experts: list[Unit]) -> Iterator[Callable[..., Run]]:
    """`run(device, chance)`; this thread's kernels are seen, and at the end the transfer is closed."""
    with ExitStack() as stack:

        def start(device: SimulatedAccelerator, chance: random.Random, **keywords: Any) -> Run:
            made = Run(units, experts, device, chance, **keywords)
            stack.callback(end, made.transfer)
            stack.enter_context(Watch(device))
            return made

        yield start


@pytest.mark.parametrize("seed", range(12))
def test_any_schedule_is_right(seed: int, run: Any) -> None:
    """Out of order, nested, left early, with reads that fail, in several streams, with experts between."""
    device = SimulatedAccelerator(seed)
    made = run(device, random.Random(seed), fails=(0.0, 0.02, 0.1)[seed % 3])
    assert made.walk(60) > 0
    made.ring.fails = lambda name: False
    for index in range(2 * len(made.transfer.units)):
        made.use(index)
    made.route(list(range(EXPERTS)))
    assert len(made.transfer.experts.layers["l"].kept()) == made.on_device + made.in_host
    made.transfer.close()
    assert device.races == []
    assert device.pending == 0


@pytest.mark.parametrize("first", range(4))
def test_an_interrupt_at_any_line_leaves_experts_and_units_right(first: int, run: Any) -> None:
    device, interrupts = SimulatedAccelerator(), 0
    made = run(device, random.Random(4 + first))
    for line in range(1 + 3 * first, 260, 12):
        interrupts += interrupt_at(line, lambda line=line: made.use(line, lambda: made.route([line % 12, (line + 5) % 12, 3])))
        made.transfer.release_all()
        assert made.transfer.held == ()
        made.route([line % 12, 3])
        made.use(line)
        kept = len(made.transfer.experts.layers["l"].kept())
        assert made.transfer.experts.free_slots >= 2 + made.on_device - kept
    assert interrupts > 8
    made.transfer.close()
    assert device.races == []


def test_residents_are_ready_for_any_stream(units: list[Unit]) -> None:
    """Not only for the stream of the thread that loaded it."""
    device = SimulatedAccelerator()
    ring = SimulatedRing(device, units[1].nbytes)
    fill_all(ring, [(units[1], 0)])
    with Watch(device), device.in_stream():
        assert torch.equal(
            units[1].weights[0].view(ring.view(0, units[1].nbytes)), torch.full(units[1].weights[0].entry.shape, 1.0)
        )
    ring.close()
    assert device.races == []


def test_closing_one_of_two_models_waits_for_its_reads(run: Any) -> None:
    """The readers' threads go on for the other one, so their end cannot be what is waited for."""
    device, reads, may_read = SimulatedAccelerator(), threading.Event(), threading.Event()
    made, _ = run(device, random.Random(1)), run(SimulatedAccelerator(), random.Random(1))

    def hold(name: str) -> bool:
        reads.set()
        return not may_read.wait(5)

    def ask() -> None:
        with suppress(ModelClosedError):
            made.transfer.acquire(made.transfer.units[0].name)

    made.ring.fails = hold
    asking, closing = threading.Thread(target=ask), threading.Thread(target=made.transfer.close)
    asking.start()
    assert reads.wait(5)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    may_read.set()
    closing.join(5)
    asking.join(5)
    assert not closing.is_alive()
    assert device.races == []


class DeafEvent(Event):
    def synchronize(self) -> None:
        """Nobody waits."""


class DeafStream(Stream):
    def wait_event(self, event: Event) -> None:
        """Nothing waits."""


class Careless(SimulatedAccelerator):
    """A device whose ring was written without one of its waits."""

    def __init__(self, forgets: str) -> None:
        self.forgets, self.synchronized = forgets, 0
        super().__init__()

    def add_stream(self, name: str, *, eager: bool) -> Stream:
        stream = super().add_stream(name, eager=eager)
        if self.forgets == ("the copies of what is read" if eager else "the last use of what is overwritten"):
            stream.__class__ = DeafStream
        return stream

    def new_event(self) -> Event:
        is_staging = not self.synchronized
        deaf = self.forgets == ("the staging buffer's last copy" if is_staging else "the copy of what is in host memory")
        return DeafEvent(self) if deaf else Event(self)

    def synchronize(self) -> None:
        self.synchronized += 1
        if self.forgets != ("whoever had the memory" if self.synchronized == 1 else "what is under way at the end"):
            super().synchronize()


FORGOTTEN = {
    "the copies of what is read": "reads",
    "the last use of what is overwritten": "is copied over",
    "the staging buffer's last copy": "changed before it was copied",
    "the copy of what is in host memory": "is read over",
    "whoever had the memory": "is copied over",
    "what is under way at the end": "memory that is unpinned",
}


@pytest.mark.parametrize("forgets", FORGOTTEN)
def test_a_wait_that_is_left_out_of_the_ring_is_found(forgets: str, run: Any) -> None:
    device = Careless(forgets)
    with suppress(RaceError):
        made = run(device, random.Random(1), kept=(2, 4))
        made.use_resident()
    with suppress(UnboundLocalError):
        for index in range(60):
            with suppress(RaceError, StreamingError, KeyboardInterrupt):
                made.step(index)
            made.transfer.release_all()
    with suppress(UnboundLocalError):
        for index in range(50):  # until something was read ahead that nothing has waited for
            made.transfer.wait_until_idle()
            if device.pending:
                break
            with suppress(RaceError):
                made.use(index)
        end(made.transfer)
    assert any(FORGOTTEN[forgets] in race for race in device.races), device.races
