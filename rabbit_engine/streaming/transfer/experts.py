"""The policy for the experts of sparse layers: those that a pass is routed to are read, the most used ones stay.

All memory is in slots of one size, each for one expert. An expert in transit takes a free slot and returns it after its use,
unless its layer keeps it. A layer keeps as many experts as its share allows, including every new one, which replaces the
least used one that is not needed now.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from rabbit_engine.errors import RabbitError, StreamingError
from rabbit_engine.streaming.telemetry.profile import ExpertsProfile
from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.entry import Entry, HostPlace
from rabbit_engine.streaming.transfer.machine import UnitMachine
from rabbit_engine.streaming.transfer.reader import Job
from rabbit_engine.streaming.transfer.ring import Mark, Ring, fill_all
from rabbit_engine.streaming.transfer.slots import Expert, ExpertLayer, Stay, who_stays
from rabbit_engine.streaming.transfer.unit import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlots:
    """Memory for the experts of `layers`: `count` slots of `nbytes` from `start` on in the device's ring, and in `host` as many
    as the layers keep there."""

    layers: Sequence[ExpertLayer]
    count: int
    nbytes: int
    start: int = 0
    host: Ring | None = None

    def on_device(self) -> list[int]:
        """The start of each slot on the device."""
        return [self.start + index * self.nbytes for index in range(self.count)]

    def in_host(self) -> list[HostPlace]:
        """The slots of host memory."""
        if self.host is None:
            return []
        return [HostPlace(self.host, index * self.nbytes) for index in range(sum(layer.in_host for layer in self.layers))]


class ExpertCache:
    """The experts in `slots`. The model's thread calls `warm` and `lend`, any thread `uses`; everything else is called with the
    lock held."""

    def __init__(self, machine: UnitMachine, slots: ExpertSlots, trace: Trace) -> None:
        self._machine, self._trace = machine, trace
        self.layers = {layer.name: layer for layer in slots.layers}
        self._slots, self._host_slots = slots.on_device(), slots.in_host()
        self._free, self._free_host = deque(self._slots), deque(self._host_slots)
        self._after: dict[int, Mark] = {}
        self._queue: deque[Entry] = deque()
        self._lent = False
        self._profile = machine.profile
        self._profile.experts = {name: ExpertsProfile(name, count=len(layer.units)) for name, layer in self.layers.items()}

    def uses(self) -> dict[str, dict[int, float]]:
        """For each layer the uses of its experts, weighted as of now. Takes no lock: a finalizer calls it."""
        return {name: layer.uses() for name, layer in self.layers.items()}

    def warm(self, uses: Mapping[str, Mapping[int, float]]) -> int:
        """Before the first pass: keep the experts that were used most, according to `uses`, and read them. Returns how many."""
        on_device: list[tuple[Unit, int]] = []
        in_host: list[tuple[Unit, HostPlace]] = []
        with self._machine.lock:
            self._machine.require_open()
            for name, layer in self.layers.items():
                layer.count(uses.get(name, {}), 0)
                chosen = layer.most_used()
                for expert in chosen[: layer.on_device]:
                    on_device.append((expert.unit, self._keep_on_device(layer, expert)))
                for expert in chosen[layer.on_device :][: layer.in_host]:
                    expert.host, expert.kept = self._free_host.popleft(), True
                    in_host.append((expert.unit, expert.host))
            fill_all(self._machine.ring, on_device)
            for ring in {place.ring for _, place in in_host}:
                fill_all(ring, [(unit, place.start) for unit, place in in_host if place.ring is ring])
            for _, place in in_host:
                place.filled = True
        return len(on_device) + len(in_host)

    def _keep_on_device(self, layer: ExpertLayer, expert: Expert) -> int:
        """Keep the expert on the device, in a free slot that is about to be filled."""
        place = self._free.popleft()
        expert.entry = Entry(
            expert.unit, layer.name, (), None, partial(self._forget, expert), state="here", place=place, issued=1
        )
        expert.kept = True
        return place

    @contextmanager
    def lend(self, name: str, uses: Mapping[int, float], tokens: int) -> Iterator[Iterator[tuple[int, torch.Tensor]]]:
        """Bring the experts in `uses`, each with how often a pass over `tokens` tokens uses it (see `decayed_uses`).

        Within the block iterate over (expert, uint8 [its unit's nbytes]), in the order of arrival; each stays until the
        next one is requested. Raises what its read raised, with the expert's name.
        """
        layer = self.layers[name]
        self._lent = True
        try:
            experts = [layer.experts[index] for index in sorted(uses)]
            self._ask(layer, experts, uses, tokens)
            yield self._arrivals(layer, experts)
            self._lent = False
        finally:
            with self._machine.lock:
                self.recover()

    @property
    def free_slots(self) -> int:
        """The number of free slots on the device."""
        return len(self._free)

    def _ask(self, layer: ExpertLayer, experts: Sequence[Expert], uses: Mapping[int, float], tokens: int) -> None:
        with self._machine.lock:
            self._machine.require_open()
            while any(expert.entry is not None and expert.entry.state == "dropped" for expert in layer.experts):
                self._machine.wait()  # a read that nobody waits for still writes
            layer.count(uses, tokens)
            self._profile.experts[layer.name].runs += 1
            for stay in who_stays(layer, experts):
                self._admit(stay, experts)
            for expert in experts:
                expert.is_read = not expert.is_here and not expert.in_host
                if not expert.is_here:
                    chunks = expert.unit.chunks() if expert.is_read else ()
                    give_back = partial(self._forget, expert)
                    expert.entry = Entry(expert.unit, layer.name, chunks, expert.host, give_back, wanted=True)
                    self._queue.append(expert.entry)
            self._machine.changed.notify_all()

    def _admit(self, stay: Stay, needed: Sequence[Expert]) -> None:
        """An interrupt may strike between any two lines: a place in host memory is marked unfilled before it is reassigned."""
        other = stay.instead_of
        if stay.in_host:
            stay.expert.host = self._free_host.popleft()
        elif other is not None and other in needed:
            other.kept = False  # it is dropped after its use
        elif other is not None:
            if other.host is not None:
                other.host.filled = False
            stay.expert.host, other.host = other.host, None
            other.kept = False
            self._leave(other)
        stay.expert.kept = True

    def _leave(self, expert: Expert) -> None:
        """Free its slot on the device, once its last use is over."""
        if expert.entry is not None and expert.entry.place >= 0:
            self._after[expert.entry.place] = expert.last_use
            self._free.append(expert.entry.place)
        expert.entry = None

    def _arrivals(self, layer: ExpertLayer, experts: Sequence[Expert]) -> Iterator[tuple[int, torch.Tensor]]:
        wanted = list(experts)
        while wanted:
            for expert in self._next_ready(layer, wanted):
                yield expert.index, self._hand_out(layer, expert)
                self._let_go(expert)
                wanted.remove(expert)

    def _hand_out(self, layer: ExpertLayer, expert: Expert) -> torch.Tensor:
        with self._machine.lock:
            self._machine.require_open()  # or a closed ring's memory could not be freed
            assert expert.entry is not None  # noqa: S101 - it has arrived
            self._machine.ring.wait(expert.entry.arrived)
            self._profile.count_expert(layer.name, is_read=expert.is_read)
            return self._machine.ring.view(expert.entry.place, expert.unit.nbytes)

    def _next_ready(self, layer: ExpertLayer, wanted: Sequence[Expert]) -> list[Expert]:
        """Those that have arrived; waits for one if none has."""
        start = time.perf_counter()
        entries = [expert.entry for expert in wanted if expert.entry is not None]
        with self._trace.span("wait", layer.name), self._machine.lock:
            while all(entry.on_its_way for entry in entries):
                self._machine.wait()
            self._profile.count_expert_wait(layer.name, time.perf_counter() - start)
            failed = next((entry for entry in entries if entry.state == "failed"), None)
            if failed is not None and failed.error is not None:
                raise _named(failed.unit.name, failed.error) from failed.error
            return [expert for expert in wanted if expert.is_here]

    def _let_go(self, expert: Expert) -> None:
        """After its use: it stays on the device, or makes room."""
        expert.last_use = self._machine.ring.last_use()
        if expert.kept and expert.host is None:
            return
        with self._machine.lock:
            self._leave(expert)
            self._machine.changed.notify_all()

    def next_job(self) -> Job | None:
        """The next part of the oldest expert that is waited for; None if there is none, or no slot is free."""
        while self._queue:
            entry = self._queue[0]
            if entry.state == "waiting":
                if not self._free:
                    return None
                place = self._free.popleft()
                entry.begin(place, self._after.get(place))
            if entry.has_parts_left:
                return self._machine.issue(entry)
            self._queue.popleft()
        return None

    def _forget(self, expert: Expert, entry: Entry) -> None:
        """It failed or is no longer waited for: keep it nowhere."""
        if expert.host is not None:
            expert.host.filled = False
            self._free_host.append(expert.host)
        self._free.append(entry.place)
        entry.place, expert.host, expert.kept = -1, None, False
        if entry.state == "dropped":
            expert.entry = None

    def recover(self) -> None:
        """After an error or an interrupt: wait for nothing, and make every slot either a kept expert's or free."""
        if not self._lent:
            return
        self._queue.clear()
        last_use = self._machine.ring.last_use()
        experts = [expert for layer in self.layers.values() for expert in layer.experts]
        for expert in experts:
            self._settle(expert, last_use)
        taken = {expert.entry.place for expert in experts if expert.entry is not None}
        taken_host = {expert.host for expert in experts}
        self._free = deque(place for place in self._slots if place not in taken)
        self._free_host = deque(place for place in self._host_slots if place not in taken_host)
        self._machine.changed.notify_all()
        self._lent = False

    def _settle(self, expert: Expert, last_use: Mark) -> None:
        """Keep it where it belongs; it may have been in use when the error or the interrupt struck."""
        if expert.entry is not None and expert.entry.under_way:
            self._machine.drop(expert.entry)
            return
        expert.last_use = last_use
        if expert.is_here and expert.kept and expert.host is None:
            return
        if expert.entry is not None and expert.entry.place >= 0:
            self._after[expert.entry.place] = last_use
        expert.entry, expert.kept = None, expert.in_host
        expert.host = expert.host if expert.in_host else None

    def forget(self) -> None:
        """Drop everything: nothing will be read any more."""
        self._queue.clear()


def _named(name: str, error: BaseException) -> BaseException:
    """The error of a read, with the expert's name, in its own class if that is one of ours."""
    kind = type(error) if isinstance(error, RabbitError) else StreamingError
    return kind(f"{name} could not be read: {error}")
