"""The experts of sparse layers: those that a pass is routed to are brought, the most used ones stay.

All memory is in slots of one size, each for one expert. An expert on its way takes a free slot and gives it back when it
was used, unless its layer keeps it. A layer keeps as many as its share allows, and every new one: it takes the place of the
least used one that is not needed now. Uses fade with the tokens that the layer has seen since (docs/benchmarks.md has the
policies that were tried).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from rabbit_engine.errors import ModelClosedError, RabbitError, StreamingError
from rabbit_engine.streaming.telemetry.profile import ExpertsProfile, Profile
from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.reader import Job, shared_reader
from rabbit_engine.streaming.transfer.ring import Mark, Ring
from rabbit_engine.streaming.transfer.unit import Extent, Unit

HALF_LIFE_TOKENS = 32
"""A use counts half after its layer has seen this many more tokens."""

_MOST_AGE = 600.0
"""Halvings, before scores are rescaled: floats hold about a thousand."""


@dataclass(slots=True, eq=False)
class _Expert:
    """One expert: `slot` is its place on the device, `host` its place in host memory, -1 for none."""

    unit: Unit
    index: int
    state: Literal["away", "waiting", "reading", "here", "failed", "dropped"] = "away"
    slot: int = -1
    host: int = -1
    in_host: bool = False
    kept: bool = False
    score: float = 0.0
    after: Mark = None
    arrived: Mark = None
    last_use: Mark = None
    is_read: bool = False
    chunks: tuple[Extent, ...] = ()
    issued: int = 0
    under_way: int = 0
    error: BaseException | None = None

    @property
    def parts(self) -> int:
        """In how many jobs it comes."""
        return len(self.chunks) or 1


@dataclass(slots=True)
class ExpertLayer:
    """One layer's experts, of which a token uses `used`, and how many of them it may keep on the device and in host memory."""

    name: str
    units: Sequence[Unit]
    used: int
    on_device: int
    in_host: int = 0
    experts: list[_Expert] = field(init=False)
    age: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.experts = [_Expert(unit, index) for index, unit in enumerate(self.units)]

    def count(self, uses: Mapping[int, float], tokens: int) -> None:
        """Add the uses of a pass of so many tokens, as they weigh at its end: what is older fades, as newer ones weigh more."""
        self.age += tokens / HALF_LIFE_TOKENS
        if self.age > _MOST_AGE:
            for expert in self.experts:
                expert.score *= 2.0**-self.age
            self.age = 0.0
        for index, weight in uses.items():
            self.experts[index].score += weight * 2.0**self.age

    def kept(self) -> list[_Expert]:
        """The experts that stay."""
        return [expert for expert in self.experts if expert.kept]


class ExpertCache:
    """`slots` slots of `slot_bytes` from `base` on in `ring`, and in `host` as many as the layers may keep there.

    `lend` is for the thread that runs the model; the rest is called by the Streamer that owns it, with the lock held.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        ring: Ring,
        slots: int,
        slot_bytes: int,
        *,
        base: int = 0,
        host: Ring | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._ring, self._host = ring, host
        self._slot_bytes, self._base, self._slots = slot_bytes, base, slots
        self._free: deque[int] = deque(range(slots))
        self._after: list[Mark] = [None] * slots
        self._host_slots = sum(layer.in_host for layer in layers)
        self._free_host: deque[int] = deque(range(self._host_slots))
        self._after_host: list[Mark] = [None] * self._host_slots
        self._queue: deque[_Expert] = deque()
        self._under_way = 0
        self._lent = self._closed = False
        self._trace = trace or Trace()
        counts = {layer.name: ExpertsProfile(layer.name, count=len(layer.units)) for layer in layers}
        self.profile = Profile(experts=counts)
        reader = shared_reader()
        self._lock, self._changed = reader.lock, reader.changed

    @contextmanager
    def lend(self, name: str, uses: Mapping[int, float], tokens: int) -> Iterator[Iterator[tuple[int, torch.Tensor]]]:
        """Bring the experts that `uses` names, each with how often a pass uses it that is so many tokens long (see
        `decayed_uses`).

        Within the block iterate over (expert, uint8 [its unit's nbytes]), in the order in which they are there; each is
        there until the next one is asked for. Raises what its read raised, with the expert's name.
        """
        layer = self._layers[name]
        self._lent = True
        try:
            experts = [layer.experts[index] for index in sorted(uses)]
            self._ask(layer, experts, uses, tokens)
            yield self._arrivals(layer, experts)
            self._lent = False
        finally:
            self.recover()

    def _ask(self, layer: ExpertLayer, experts: Sequence[_Expert], uses: Mapping[int, float], tokens: int) -> None:
        with self._lock:
            while any(expert.state == "dropped" for expert in layer.experts):  # a read that nobody waits for still writes
                self._changed.wait()
            self._require_open()
            layer.count(uses, tokens)
            self.profile.experts[layer.name].runs += 1
            missing = [expert for expert in experts if expert.state != "here"]
            self._admit(layer, missing, experts)
            for expert in experts:
                expert.is_read = expert.state != "here" and not expert.in_host
            for expert in missing:
                expert.state, expert.issued, expert.error = "waiting", 0, None
                expert.chunks = () if expert.in_host else expert.unit.chunks()
            self._queue.extend(missing)
            self._changed.notify_all()

    def _admit(self, layer: ExpertLayer, missing: Sequence[_Expert], needed: Sequence[_Expert]) -> None:
        """Let the missing stay, the most used first: where there is room, or for one that is not needed now, or was used less.

        A layer that keeps no more than a token uses would forget everything at each token: there only a more used one stays.
        """
        if not missing:
            return
        kept, now = layer.kept(), {*needed}
        idle = sorted({*kept} - now, key=lambda expert: -expert.score)  # the least used one last
        in_use = sorted((e for e in kept if e in now and e.state == "here"), key=lambda expert: -expert.score)
        is_small = layer.on_device + layer.in_host <= layer.used
        on_device = sum(expert.host < 0 for expert in kept)
        in_host = len(kept) - on_device
        for expert in sorted((e for e in missing if not e.kept), key=lambda expert: -expert.score):
            if on_device < layer.on_device:
                on_device += 1
            elif in_host < layer.in_host:
                in_host += 1
                expert.host = self._free_host.popleft()
            elif idle and (not is_small or idle[-1].score < expert.score):
                expert.host = idle[-1].host
                self._evict(idle.pop())
            elif in_use and in_use[-1].score < expert.score:
                in_use.pop().kept = False  # it goes when it was used
            else:
                return
            expert.kept = True

    def _evict(self, expert: _Expert) -> None:
        """Forget what is there of it; who takes its place in host memory takes it over."""
        expert.kept = expert.in_host = False
        expert.host = -1
        self._leave(expert)

    def _leave(self, expert: _Expert) -> None:
        """Its slot on the device is free, once its last use is over."""
        if expert.slot >= 0:
            self._after[expert.slot] = expert.last_use
            self._free.append(expert.slot)
        expert.slot, expert.state = -1, "away"

    def _arrivals(self, layer: ExpertLayer, experts: Sequence[_Expert]) -> Iterator[tuple[int, torch.Tensor]]:
        wanted = list(experts)
        while wanted:
            for expert in self._next_ready(layer, wanted):
                yield expert.index, self._hand_out(layer, expert)
                self._let_go(expert)
                wanted.remove(expert)

    def _hand_out(self, layer: ExpertLayer, expert: _Expert) -> torch.Tensor:
        with self._lock:
            self._require_open()  # the ring's memory goes once the lock is free
            self._ring.wait(expert.arrived)
            self.profile.count_expert(layer.name, is_read=expert.is_read)
            return self._ring.view(self._base + expert.slot * self._slot_bytes, expert.unit.nbytes)

    def _next_ready(self, layer: ExpertLayer, wanted: Sequence[_Expert]) -> list[_Expert]:
        """Those that are here; waits for one where none is."""
        start = time.perf_counter()
        with self._trace.span("wait", layer.name), self._lock:
            while not any(expert.state in ("here", "failed") for expert in wanted):
                self._changed.wait()
                self._require_open()
            self.profile.count_expert_wait(layer.name, time.perf_counter() - start)
            failed = next((expert for expert in wanted if expert.state == "failed"), None)
            if failed is not None and failed.error is not None:
                raise _named(failed.unit.name, failed.error) from failed.error
            return [expert for expert in wanted if expert.state == "here"]

    def _let_go(self, expert: _Expert) -> None:
        """It was used: it stays on the device, or makes room."""
        expert.last_use = self._ring.last_use()
        if expert.kept and expert.host < 0:
            return
        with self._lock:
            self._leave(expert)
            self._changed.notify_all()

    def _require_open(self) -> None:
        if self._closed:
            raise ModelClosedError("the model is closed: load it again")

    # What follows is called with the lock held: by the readers' threads, and by the Streamer.

    def next_job(self) -> Job | None:
        """The next chunk of the oldest expert that is waited for; None while nothing is, or no slot is free."""
        while self._queue:
            expert = self._queue[0]
            if expert.state == "waiting":
                if not self._free:
                    return None
                expert.slot = self._free.popleft()
                expert.after, expert.state = self._after[expert.slot], "reading"
            if expert.state == "reading" and expert.issued < expert.parts:
                return self._issue(expert)
            self._queue.popleft()
        return None

    def _issue(self, expert: _Expert) -> Job:
        chunk = expert.chunks[expert.issued] if expert.chunks else None
        expert.issued += 1
        expert.under_way += 1
        self._under_way += 1
        self.profile.begin_read(time.perf_counter())
        return partial(self._work, expert, chunk)

    def _work(self, expert: _Expert, chunk: Extent | None, lane: int) -> Callable[[], None]:
        """Read one chunk, to host memory first if it stays there; or copy an expert that waits there. Without the lock."""
        begin, error = time.perf_counter(), None
        start, name = self._base + expert.slot * self._slot_bytes, expert.unit.name
        try:
            if self._host is None or expert.host < 0:
                assert chunk is not None  # noqa: S101 - only what is in host memory comes without a read
                self._ring.fill(chunk, start, expert.after, name, lane)
            else:
                self._bring_through_host(self._host, expert, chunk, start, lane)
        except Exception as caught:  # noqa: BLE001 - raised where the expert is asked for
            error = caught
        return partial(self._done, expert, chunk, error, time.perf_counter() - begin)

    def _bring_through_host(self, host: Ring, expert: _Expert, chunk: Extent | None, start: int, lane: int) -> None:
        there, name = expert.host * self._slot_bytes, expert.unit.name
        place, nbytes = (0, expert.unit.nbytes) if chunk is None else (chunk.place, chunk.nbytes)
        if chunk is not None:
            self._ring.finish(self._after_host[expert.host])  # a copy of the one that was there before
            host.fill(chunk, there, None, name, lane)
        self._ring.copy(host.view(there + place, nbytes), start + place, expert.after, name)

    def _done(self, expert: _Expert, chunk: Extent | None, error: Exception | None, seconds: float) -> None:
        expert.under_way -= 1
        self._under_way -= 1
        self.profile.end_read(time.perf_counter())
        layer = expert.unit.name.rpartition("[")[0]
        if error is None and chunk is not None:
            self.profile.count_read(layer, chunk.read_bytes, seconds)
        elif error is None:
            self.profile.count_copy(layer, expert.unit.nbytes, seconds)
        expert.error = expert.error or error
        if expert.error is not None:
            expert.issued = expert.parts
        if expert.under_way or expert.issued < expert.parts:
            return
        expert.arrived = self._ring.seal()
        if expert.host >= 0:
            self._after_host[expert.host] = expert.arrived
        if expert.state == "dropped" or expert.error is not None:
            self._forget(expert)
        else:
            expert.state, expert.in_host = "here", expert.host >= 0

    def _forget(self, expert: _Expert) -> None:
        """It did not come, or nobody waits for it any more: it stays nowhere."""
        if expert.host >= 0:
            self._free_host.append(expert.host)
        self._free.append(expert.slot)
        expert.state = "away" if expert.state == "dropped" else "failed"
        expert.kept = expert.in_host = False
        expert.slot = expert.host = -1

    def recover(self) -> None:
        """After an error or an interrupt: nothing is waited for, and every slot is one's that is kept, or free."""
        with self._lock:
            if self._lent:
                self._recover()
                self._lent = False

    def _recover(self) -> None:
        self._queue.clear()
        experts = [expert for layer in self._layers.values() for expert in layer.experts]
        last_use = self._ring.last_use()
        for expert in experts:
            if expert.under_way:
                expert.state = "dropped"
                expert.issued = expert.parts
            elif expert.state == "here" and expert.kept and expert.host < 0:
                continue
            else:
                if expert.slot >= 0:
                    self._after[expert.slot] = last_use
                expert.kept, expert.state, expert.slot = expert.in_host, "away", -1
                expert.host = expert.host if expert.in_host else -1
        taken, taken_host = {expert.slot for expert in experts}, {expert.host for expert in experts}
        self._free = deque(slot for slot in range(self._slots) if slot not in taken)
        self._free_host = deque(slot for slot in range(self._host_slots) if slot not in taken_host)
        self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a read is under way."""
        return self._under_way > 0

    def close(self) -> None:
        """Nothing is read any more. Who waits is told."""
        self._closed = True
        self._queue.clear()

    def free(self) -> None:
        """Let go of the slots in host memory, once nothing is under way."""
        if self._host is not None:
            self._host.close()


def _named(name: str, error: BaseException) -> BaseException:
    """The error of a read, with the expert's name; of its own class where that is one of ours."""
    kind = type(error) if isinstance(error, RabbitError) else StreamingError
    return kind(f"{name} could not be read: {error}")
