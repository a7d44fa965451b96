"""Binds units to the modules of a model: each unit is there while its module runs.

The forwards are wrapped, not hooked: a `finally` also sees KeyboardInterrupt, which torch's `always_call` hooks do not.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from rabbit_engine.streaming.binding.bound import BoundUnit, ResidentUnit
from rabbit_engine.streaming.binding.passes import Passes
from rabbit_engine.streaming.binding.scratch import Scratch
from rabbit_engine.streaming.binding.unit_weights import UnitWeights
from rabbit_engine.streaming.binding.wrapping import not_compiled, refuse_gradients
from rabbit_engine.streaming.scheduler import fiber_on
from rabbit_engine.streaming.telemetry.progress import PassMeter
from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.transfer import Transfer
from rabbit_engine.streaming.transfer.unit import Unit


class Binding:
    """The bound units of a model, which it brings from `transfer`: for the thread of a pass, or the fibers of a scheduler.

    Encoded weights are decoded into `scratches`.
    """

    def __init__(
        self,
        transfer: Transfer,
        device: torch.device,
        trace: Trace,
        *,
        scratches: Sequence[Scratch] = (),
        layers: Sequence[str] = (),
        show_progress: bool = False,
    ) -> None:
        self._transfer, self._device, self._trace, self._scratches = transfer, device, trace, scratches
        self._bound: dict[str, BoundUnit] = {}
        self._meter = PassMeter({unit.name: unit.nbytes for unit in transfer.units}, layers, show_bar=show_progress)
        self.passes = Passes(transfer, self._meter, self._release_all)

    # At loading.

    def bind(self, module: nn.Module, bound: BoundUnit) -> None:
        """Bring the unit whenever `module` runs; one that stays is only decoded."""
        self._bound[bound.unit.name] = bound
        if isinstance(bound, ResidentUnit):
            self._wrap(module, bound.unit.name, functools.partial(self._run_resident, bound))
        else:
            self._wrap(module, bound.unit.name, functools.partial(self._run_streamed, bound))

    def _wrap(self, module: nn.Module, name: str, run_with_unit: Callable[[Callable[[], Any]], Any]) -> None:
        native, transfer, lock = module.forward, self._transfer, self.passes.lock

        def run(*args: object, **kwargs: object) -> Any:
            refuse_gradients(name, module, args, kwargs)
            transfer.require_open()  # a forked process inherits locks that nobody there will release
            with lock:  # reentrant: held by a pass, but not by callers of a layer alone
                return run_with_unit(functools.partial(native, *args, **kwargs))

        module.forward = not_compiled(run, native)

    # While the model runs.

    def root_pass(self, sequences: int = 1) -> AbstractContextManager[None]:
        """A block that runs one forward of the root, over `sequences` sequences."""
        return self.passes.forward(sequences, fiber_on(self))

    def _run_streamed(self, bound: BoundUnit, forward: Callable[[], Any]) -> Any:
        name = bound.unit.name
        place, memory = self._acquire(name)  # before the try: what was not acquired must not be released
        try:
            with self.computing(name), bound.using(memory):
                bound.set_weights(place, memory)
                return forward()
        finally:
            self.let_go(name)

    def _run_resident(self, bound: ResidentUnit, forward: Callable[[], Any]) -> Any:
        try:
            with bound.using(bound.memory):
                bound.set_weights(0, bound.memory)
                return forward()
        finally:
            bound.set_placeholders()

    @contextmanager
    def borrow(self, unit: Unit, weights: UnitWeights) -> Iterator[torch.Tensor]:
        """Provide the single weight of a unit that has no module of its own, while the block runs."""
        self._transfer.require_open()
        with self.passes.lock:
            _, memory = self._acquire(unit.name)
            try:
                with self.computing(unit.name), weights.using(memory):
                    yield weights.views(memory)[0]
            finally:
                self.let_go(unit.name)

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Count the time of the unit's module: on a GPU only of launching it, its own time is in the trace."""
        start = time.perf_counter()
        with self._trace.device_span("compute", name, self._device):
            yield
        self._transfer.count_compute(name, time.perf_counter() - start)

    def _acquire(self, name: str) -> tuple[int, torch.Tensor]:
        """Acquire a unit; a fiber first waits until its scheduler holds it."""
        fiber = fiber_on(self)
        if fiber is not None:
            fiber.await_unit(name)
        return self._bring(name)

    def _bring(self, name: str) -> tuple[int, torch.Tensor]:
        self._meter.enter(name)
        with self._trace.span("wait", name):
            return self._transfer.acquire(name)

    # For a scheduler: the units of its fibers.

    @property
    def pass_read_s(self) -> float:
        """Seconds in which the weights of a pass move."""
        return self._transfer.pass_read_s

    def scheduled_pass(self) -> AbstractContextManager[None]:
        """The pass of all fibers of a scheduler."""
        return self.passes.run()

    def hold(self, name: str) -> None:
        """Acquire a unit for all fibers of a scheduler."""
        self._bring(name)

    def let_go(self, name: str) -> None:
        """Release a unit. After its last release its placeholders are set."""
        if self._transfer.release(name):
            if name in self._bound:
                self._bound[name].set_placeholders()
            self._meter.leave(name)

    # At the end of a pass, and of the model.

    def _release_all(self) -> None:
        for bound in self._bound.values():  # not only those held: an interrupt may have struck between release and here
            bound.set_placeholders()
        for scratch in self._scratches:
            scratch.reset()
        self._transfer.release_all()

    def forget(self) -> None:
        """Drop every view of the ring."""
        with self.passes.lock:
            for bound in self._bound.values():
                bound.forget()
            for scratch in self._scratches:
                scratch.forget()
