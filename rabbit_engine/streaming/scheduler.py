"""Runs many texts in one pass: each runs transformers' own forward, and all go through the layers together.

A fiber is a coroutine (a greenlet) that runs one generation and yields whenever it needs a unit that is not in memory.
When all fibers wait, the unit is read once, and one fiber after another computes with it. So each runs the same kernels
on the same shapes as it would alone, and gets the same bits; they share only the transfer of the weights.

`share_products` adds what Yu et al. (Orca, OSDI 2022) call selective batching: fibers also meet at every linear layer,
which then runs once over all their tokens. That is faster if computing is the bottleneck, but gives up bit equality: a
kernel's order of summation may depend on the number of rows.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import nn


class UnitSource(Protocol):
    """The units of a model, as fibers use them."""

    @property
    def pass_read_s(self) -> float:
        """Seconds in which the weights of a pass move; 0 if unknown."""
        ...

    def scheduled_pass(self) -> AbstractContextManager[None]:
        """A block in which one pass runs."""
        ...

    def hold(self, name: str) -> None:
        """Bring the unit into memory. Raises what its read raised."""
        ...

    def let_go(self, name: str) -> None:
        """Release a unit from `hold`; it may be dropped after its last release."""
        ...


_Forward = Callable[[torch.Tensor], torch.Tensor]

_START = "the start"
"""What a fiber waits for that has prepared its part of a pass."""


@dataclass(slots=True, eq=False)
class _Product:
    """A fiber's request to a linear layer: [..., inputs] to [..., outputs]."""

    forward: _Forward
    states: torch.Tensor
    result: torch.Tensor | None = None


class RandomStream:
    """The random state of one fiber, swapped into torch's shared generators while the fiber runs.

    A fiber draws the same numbers as if it ran alone after `torch.manual_seed(seed)`. Fibers of all schedulers take turns;
    another thread that draws in the meantime uses whichever state is set.
    """

    _turn = threading.Lock()

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed: int | None = seed
        self._device = device
        self._mine: list[torch.Tensor] = []
        self._others: list[torch.Tensor] = []

    def take(self) -> None:
        """Swap this state into torch's generators."""
        self._turn.acquire()
        self._others = self._states()
        if self._seed is not None:
            torch.manual_seed(self._seed)
            self._seed = None
        else:
            self._set(self._mine)

    def put_back(self) -> None:
        """Save this state and restore the previous one."""
        self._mine = self._states()
        self._set(self._others)
        self._turn.release()

    def _states(self) -> list[torch.Tensor]:
        if self._device.type == "cpu":
            return [torch.get_rng_state()]
        return [torch.get_rng_state(), torch.get_device_module(self._device).get_rng_state()]

    def _set(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.get_device_module(self._device).set_rng_state(state)


@dataclass(frozen=True, slots=True)
class SharedPass:
    """Pass `number` of a scheduler, which has a name, and how many `texts` go through it: fibers that have not failed."""

    scheduler: str
    number: int
    texts: int


_Wanted = str | _Product | Future[Any] | None

_Phase = Literal["own time", "preparing", "in the pass"]


class Fiber(greenlet):
    """One generation, `work()`, in the thread of its scheduler; `failure` is the exception it raised.

    Before its part of each pass it may prepare that, such as guess tokens: no unit is read until all fibers have.
    """

    def __init__(
        self,
        work: Callable[[], None],
        source: UnitSource,
        random_stream: RandomStream | None = None,
        *,
        shares: bool = False,
        fibers: Callable[[], Sequence[Fiber]] = tuple,
        shared: Callable[[], SharedPass | None] = lambda: None,
    ) -> None:
        super().__init__(self._run)
        self.failure: BaseException | None = None
        self._work = work
        self._source = source
        self._random_stream, self._has_random_stream = random_stream, False
        self.shares = shares
        self._fibers, self._shared = fibers, shared
        self._phase: _Phase = "own time"
        self._rows = 0
        self._wants: _Wanted = None
        self._stopped_by: BaseException | None = None

    def _run(self) -> None:
        self.begin_own_time()
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - it would be raised in whoever resumed this fiber
            self.failure = error
            traceback.clear_frames(error.__traceback__)  # its frames hold the cache until the next garbage collection
        finally:
            self._end_own_time()

    def begin_own_time(self) -> None:
        """Called after its pass: until it waits for the next, it runs alone."""
        self._phase = "own time"
        if self._random_stream is not None and not self._has_random_stream:
            self._has_random_stream = True
            self._random_stream.take()

    def _end_own_time(self) -> None:
        if self._random_stream is not None and self._has_random_stream:
            self._has_random_stream = False
            self._random_stream.put_back()

    @property
    def wants(self) -> _Wanted:
        """The unit, product or future that it waits for within a pass."""
        return self._wants

    @property
    def measures(self) -> bool:
        """Whether it is the one that measures the pass: the last that told its rows, whose time includes all of the others'."""
        return self is next((fiber for fiber in reversed(self._fibers()) if fiber._rows), None)

    @property
    def shared_pass(self) -> SharedPass | None:
        """The pass that it is in; None if it has no scheduler."""
        return self._shared()

    def travels_on(self, source: UnitSource) -> bool:
        """Whether this is its scheduler's source, not that of a second model that its work calls."""
        return self._source is source

    def stop(self, reason: BaseException) -> None:
        """Raise `reason` in its work at the next unit or pass it waits for. Any thread may call this."""
        self._stopped_by = reason

    def resume(self) -> None:
        """Run it until it waits again or ends."""
        if self.dead:
            return
        if self._stopped_by is not None:
            self.throw(self._stopped_by)
        else:
            self.switch()

    def await_pass(self) -> int:
        """Wait for the next pass, to prepare its part. Called by its work; at once if it is in one.

        The number of other unfinished fibers, which share the pass.
        """
        if self._phase == "own time":
            self._end_own_time()
            self._wait(None)
            self._phase, self._rows = "preparing", 0
        return max(0, len(self._fibers()) - 1)

    def await_start(self, rows: int = 0) -> int:
        """Wait until all fibers have prepared theirs. Called by its work, if need be after `await_pass`; at once if they have.

        It computes `rows` tokens if it tells. Returns the rows of all, 1 for a fiber that does not.
        """
        self.await_pass()
        if self._phase == "preparing":
            self._rows = rows
            self._wait(_START)
            self._phase = "in the pass"
        return sum(max(1, fiber._rows) for fiber in self._fibers())

    def await_unit(self, name: str) -> None:
        """Wait until unit `name` is in memory. Called by its work."""
        self._wait(name)

    def await_product(self, forward: _Forward, states: torch.Tensor) -> torch.Tensor:
        """Compute `forward(states)` together with other fibers. Called by its work."""
        product = _Product(forward, states)
        self._wait(product)
        assert product.result is not None  # noqa: S101 - otherwise its scheduler stopped it
        return product.result

    def await_future(self, future: Future[Any]) -> None:
        """Wait until the future is done; other fibers go on. Called by its work."""
        if not future.done():
            self._wait(future)

    def _wait(self, wanted: _Wanted) -> None:
        self._wants = wanted
        try:
            self.parent.switch()  # type: ignore[union-attr]
        finally:
            self._wants = None


def fiber_on(source: UnitSource) -> Fiber | None:
    """The fiber that runs now, if this is its source."""
    current = getcurrent()
    return current if isinstance(current, Fiber) and current.travels_on(source) else None


class Scheduler:
    """Runs fibers pass by pass, in the calling thread; with `shares`, they meet where `share_products` lets them."""

    def __init__(self, source: UnitSource, *, shares: bool = False) -> None:
        self._source, self._shares = source, shares
        self._fibers: list[Fiber] = []
        self._name, self._passes = uuid.uuid4().hex, 0
        self._aboard: tuple[Fiber, ...] = ()
        self._met: dict[str, set[Fiber]] = {}
        """Who has been at which unit in this pass."""

    @property
    def fibers(self) -> int:
        """The number of unfinished fibers."""
        return len(self._fibers)

    def add(self, work: Callable[[], None], random_stream: RandomStream | None = None, *, exact: bool = False) -> Fiber:
        """Add a fiber and run it to its first pass. With `exact`, it meets no others."""
        shares = self._shares and not exact
        fiber = Fiber(work, self._source, random_stream, shares=shares, fibers=lambda: self._fibers, shared=self._shared_pass)
        fiber.resume()
        self._fibers.append(fiber)
        self._forget_the_done()
        return fiber

    def stop(self, reason: BaseException) -> None:
        """Raise `reason` in the work of every fiber."""
        for fiber in self._fibers:
            fiber.stop(reason)
            fiber.resume()
        self._forget_the_done()

    def run_pass(self) -> None:
        """Run one pass of all fibers; one that ends or fails does not stop the others."""
        aboard = self._aboard = tuple(self._fibers)
        self._passes += 1
        until: float | None = None
        with self._source.scheduled_pass():
            for fiber in aboard:
                fiber.resume()
            for fiber in aboard:
                if fiber.wants == _START:
                    fiber.resume()
            while waiting := [fiber for fiber in aboard if fiber.wants is not None]:
                _resume_the_answered(waiting)
                here = [fiber for fiber in waiting if not isinstance(fiber.wants, Future) and fiber.wants is not None]
                if here and isinstance(here[0].wants, _Product):
                    _multiply(here)
                elif here:
                    until = time.monotonic() + self._source.pass_read_s if until is None else until
                    if not self._await_others(here[0].wants, waiting, until):
                        until = None
                        self._bring(here)
        self._forget_the_done()

    def _shared_pass(self) -> SharedPass:
        return SharedPass(self._name, self._passes, sum(fiber.failure is None for fiber in self._aboard))

    def _await_others(self, name: _Wanted, waiting: list[Fiber], until: float) -> bool:
        """Wait until one is back that was elsewhere and still comes to the unit, so that it is not read once more for it. Not if
        there is none, or `until` is past: by then reading again is no slower."""
        met = self._met.get(str(name), ())
        coming = [fiber.wants for fiber in waiting if isinstance(fiber.wants, Future) and fiber not in met]
        return bool(coming) and bool(wait(coming, max(0.0, until - time.monotonic()), FIRST_COMPLETED).done)

    def _bring(self, waiting: list[Fiber]) -> None:
        """Read the unit that the first fiber waits for, and resume all that wait for it. If the read fails, only the first one
        fails: the next one tries again."""
        name = waiting[0].wants
        assert isinstance(name, str)  # noqa: S101 - they wait for a unit
        try:
            self._source.hold(name)
        except Exception as error:  # noqa: BLE001 - raised where the unit is requested
            waiting[0].stop(error)
            waiting[0].resume()
            return
        try:
            for fiber in waiting:
                if fiber.wants == name:
                    self._met.setdefault(name, set()).add(fiber)
                    fiber.resume()
        finally:
            self._source.let_go(name)

    def _forget_the_done(self) -> None:
        self._fibers = [fiber for fiber in self._fibers if not fiber.dead]
        self._aboard = ()  # the dead hold what they worked with
        self._met.clear()


def _resume_the_answered(waiting: list[Fiber]) -> None:
    """Resume those whose futures are done, in order; if all wait for futures, the first that are."""
    futures = [fiber.wants for fiber in waiting if isinstance(fiber.wants, Future)]
    if len(futures) == len(waiting):
        wait(futures, return_when=FIRST_COMPLETED)
    for fiber in waiting:
        if isinstance(fiber.wants, Future) and fiber.wants.done():
            fiber.resume()


def _multiply(waiting: list[Fiber]) -> None:
    """Run the linear layer of the first fiber once for all that wait at it, and resume them."""
    first = waiting[0].wants
    wants = [(fiber, fiber.wants) for fiber in waiting]
    met = [(fiber, want) for fiber, want in wants if isinstance(want, _Product) and want.forward is first.forward]  # type: ignore[union-attr]
    try:
        _compute([product for _, product in met])
    except Exception as error:  # noqa: BLE001 - raised in each fiber's own layer
        for fiber, _ in met:
            fiber.stop(error)
    for fiber, _ in met:
        fiber.resume()


def _compute(products: list[_Product]) -> None:
    rows = [product.states.reshape(-1, product.states.shape[-1]) for product in products]
    outputs = products[0].forward(torch.cat(rows)).split([len(part) for part in rows])
    for product, output in zip(products, outputs, strict=True):
        product.result = output.reshape(*product.states.shape[:-1], output.shape[-1])


class HasModules(Protocol):
    """A model, or its wrapper."""

    def modules(self) -> Iterable[nn.Module]:
        """Its modules, at any depth."""


def share_products(model: HasModules, source: UnitSource) -> Callable[[], None]:
    """Let fibers on `source` meet at every linear layer of the model if their scheduler shares; others run it as before.

    Call the result, once per call of this, to restore the layers' own forward.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    with _meeting_points:
        for layer in layers:
            _meet_at(layer, source)
    return functools.partial(_part_at, layers)


_meeting_points = threading.Lock()


class _Meeting:
    """The forward of a linear layer at which fibers meet, for `users` sessions."""

    def __init__(self, layer: nn.Linear, source: UnitSource) -> None:
        self.own = layer.__dict__.get("forward")
        self.users = 0
        self._native, self._source = layer.forward, source
        functools.update_wrapper(self, layer.forward)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the parameter's name in torch
        fiber = fiber_on(self._source)
        return fiber.await_product(self._native, input) if fiber is not None and fiber.shares else self._native(input)


def _meet_at(layer: nn.Linear, source: UnitSource) -> None:
    if not isinstance(layer.__dict__.get("forward"), _Meeting):
        layer.forward = _Meeting(layer, source)  # type: ignore[method-assign]
    layer.forward.users += 1  # type: ignore[attr-defined]


def _part_at(layers: list[nn.Linear]) -> None:
    """Undo `_meet_at`, except for layers whose forward another library has since replaced."""
    with _meeting_points:
        for layer in layers:
            meeting = layer.__dict__.get("forward")
            if isinstance(meeting, _Meeting):
                meeting.users -= 1
                if not meeting.users:
                    _restore(layer, meeting.own)


def _restore(layer: nn.Linear, forward: _Forward | None) -> None:
    if forward is None:  # the class's own
        del layer.forward
    else:
        layer.forward = forward  # type: ignore[assignment, method-assign]


def _renew_locks() -> None:
    """A forked child inherits locks that none of its threads will release, and may load a model itself."""
    global _meeting_points
    _meeting_points = threading.Lock()
    RandomStream._turn = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
