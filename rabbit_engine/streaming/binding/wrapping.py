"""Binds units to their modules: weights appear as parameters while the module runs, and are placeholders otherwise.

The forwards are wrapped, not hooked: a `finally` also sees KeyboardInterrupt, which torch's `always_call` hooks do not.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent
from torch import nn

from rabbit_engine.errors import CannotExportError, CannotTrainError
from rabbit_engine.streaming.binding.placeholder import StandIns
from rabbit_engine.streaming.binding.scratch import Scratch
from rabbit_engine.streaming.scheduler import fiber_on
from rabbit_engine.streaming.telemetry.progress import PassProgress
from rabbit_engine.streaming.telemetry.trace import Trace
from rabbit_engine.streaming.transfer.transfer import Transfer
from rabbit_engine.streaming.transfer.unit import Unit
from rabbit_engine.utils.bar import Bar

_PLACES = 8
_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Where a weight belongs: an attribute of a module (the object: names change under adapters), in one of its tables."""

    module: nn.Module
    attribute: str

    @property
    def table(self) -> dict[str, Any]:
        """The module's parameters or buffers, whichever holds this weight."""
        module = self.module
        return module._buffers if self.attribute in module._buffers else module._parameters

    @property
    def holds_parameter(self) -> bool:
        """Whether it holds a parameter now, not a buffer."""
        return self.attribute in self.module._parameters

    def set(self, tensor: torch.Tensor) -> None:
        """Put `tensor` there."""
        self.table[self.attribute] = tensor


def weight_refs(model: nn.Module, names: Sequence[str]) -> dict[str, WeightRef]:
    """The ref of each weight of the model's state dict."""
    return {name: WeightRef(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}


class BoundUnit:
    """A unit, the refs of its weights, and their placeholders."""

    def __init__(
        self, unit: Unit, refs: Mapping[str, Sequence[WeightRef]], stand_ins: StandIns, scratch: Scratch | None = None
    ) -> None:
        self.unit = unit
        self._scratch = scratch
        self._decoded = scratch.views(unit) if scratch is not None else []
        self._refs = [refs[weight.entry.name] for weight in unit.weights]
        self._are_parameters = [refs[0].holds_parameter for refs in self._refs]
        pairs = zip(unit.weights, self._are_parameters, strict=True)
        self._away = [stand_ins.stand_in(weight.entry, is_parameter) for weight, is_parameter in pairs]
        self._views: dict[int, list[torch.Tensor]] = {}
        self.take_away()

    def bring(self, place: int, memory: torch.Tensor) -> None:
        """Set views of the ring, or of the scratch for encoded weights. They are cached for the places where a unit is often
        put: rebinding takes 0.1 microseconds, a new Parameter 8."""
        if place not in self._views:
            if len(self._views) == _PLACES:
                self._views.clear()
            self._views[place] = self._make_views(memory)
        self._set(self._views[place])

    def _make_views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        decoded = iter(self._decoded)
        found = (next(decoded) if weight.entry.is_encoded else weight.view(memory) for weight in self.unit.weights)
        kinds = zip(found, self._are_parameters, strict=True)
        return [nn.Parameter(view, requires_grad=False) if is_parameter else view for view, is_parameter in kinds]

    def decoded(self, memory: torch.Tensor) -> AbstractContextManager[None]:
        """Provide its decoded weights in the scratch within the block; the unit is in `memory`. Raises StreamingError."""
        return _NOTHING if self._scratch is None else self._scratch.holding(self.unit, memory, self._decoded)

    def take_away(self) -> None:
        """Restore the placeholders."""
        self._set(self._away)

    def _set(self, tensors: Sequence[torch.Tensor]) -> None:
        for refs, tensor in zip(self._refs, tensors, strict=True):
            for ref in refs:
                ref.set(tensor)

    def forget(self) -> None:
        """Drop the views, so that the ring's memory can be freed."""
        self.take_away()
        self._views.clear()
        self._decoded.clear()


class Binding:
    """All bound units of a model, and the one lock under which its forwards run.

    A pass belongs to one thread, or to a scheduler, whose fibers are several flows in one thread.
    """

    def __init__(
        self,
        transfer: Transfer,
        device: torch.device,
        trace: Trace,
        *,
        layers: Sequence[str] = (),
        show_progress: bool = False,
    ) -> None:
        self._transfer = transfer
        self._device = device
        self._trace = trace
        self._bytes = {unit.name: unit.nbytes for unit in transfer.units}
        self._units: dict[str, BoundUnit] = {}
        self._scratches: list[Scratch] = []
        self._lock = threading.RLock()
        self._sequences: dict[Any, int] = {}
        """The number of sequences in the pass of each flow, which is a greenlet; every thread has one."""

        self._show_progress = show_progress
        self._bar: Bar | None = None
        self._layers = layers
        self._layer_of = {name: _layer_of(name, layers) for name in self._bytes}
        self._layer, self._began_s, self._read_before, self._last_pass_s = 0, 0.0, 0, 0.0
        self.on_pass: Callable[[float], None] = lambda _: None

    def bind(
        self,
        module: nn.Module,
        unit: Unit,
        refs: Mapping[str, Sequence[WeightRef]],
        stand_ins: StandIns,
        *,
        scratch: Scratch | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        """Bring `unit` whenever `module` runs. One that stays in `memory` (uint8 [unit.nbytes]) is only decoded; encoded weights
        need `scratch`."""
        if scratch is not None:
            self._scratches.append(scratch)
        self._units[unit.name] = bound = BoundUnit(unit, refs, stand_ins, scratch)
        native = module.forward

        def run(*args: object, **kwargs: object) -> Any:
            refuse_gradients(unit.name, module, args, kwargs)
            self._transfer.require_open()  # a forked process inherits locks that nobody there will release
            forward = functools.partial(native, *args, **kwargs)
            with self._lock:  # reentrant: held by a root pass, but not by callers of a layer alone
                return self._run_streamed(bound, forward) if memory is None else self._run_resident(bound, memory, forward)

        module.forward = not_compiled(run, native)

    def _run_resident(self, bound: BoundUnit, memory: torch.Tensor, forward: Callable[[], Any]) -> Any:
        try:
            with bound.decoded(memory):
                bound.bring(0, memory)
                return forward()
        finally:
            bound.take_away()

    def _run_streamed(self, bound: BoundUnit, forward: Callable[[], Any]) -> Any:
        name = bound.unit.name
        place, memory = self._acquire(name)  # before the try: what was not acquired must not be released
        try:
            with self.computing(name), bound.decoded(memory):
                bound.bring(place, memory)
                return forward()
        finally:
            if self._release(name):
                bound.take_away()

    @contextmanager
    def borrow(self, unit: Unit) -> Iterator[torch.Tensor]:
        """Provide the single weight of a unit that has no module of its own, while the block runs."""
        self._transfer.require_open()
        with self._lock:
            _, memory = self._acquire(unit.name)
            try:
                with self.computing(unit.name):
                    yield unit.weights[0].view(memory)
            finally:
                self._release(unit.name)

    def _acquire(self, name: str) -> tuple[int, torch.Tensor]:
        fiber = fiber_on(self)
        if fiber is not None:
            fiber.await_unit(name)
        self._layer = max(self._layer, self._layer_of[name])
        with self._trace.span("wait", name):
            return self._transfer.acquire(name)

    def _release(self, name: str) -> bool:
        gone = self._transfer.release(name)
        if gone and self._bar is not None:
            self._bar.set_postfix_str(name, refresh=False)
            self._bar.update(self._bytes[name])
        return gone

    def hold(self, name: str) -> None:
        """Acquire a unit for all fibers of a scheduler."""
        self._layer = max(self._layer, self._layer_of[name])
        with self._trace.span("wait", name):
            self._transfer.acquire(name)

    def let_go(self, name: str) -> None:
        """Release a unit that all fibers have used."""
        if self._release(name) and name in self._units:
            self._units[name].take_away()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Admit one thread at a time; a root pass already holds the lock, callers of a single module do not."""
        self._transfer.require_open()
        with self._lock:
            yield

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Count the time of the unit's module: on a GPU only of launching it, its own time is in the trace."""
        start = time.perf_counter()
        with self._trace.device_span("compute", name, self._device):
            yield
        self._transfer.count_compute(name, time.perf_counter() - start)

    def progress(self) -> PassProgress | None:
        """The progress of the running pass; None between passes. Thread-safe."""
        began = self._began_s
        if not began:
            return None
        read = self._transfer.bytes_read - self._read_before
        elapsed = time.perf_counter() - began
        return PassProgress(self._layer, len(self._layers), max(0, read), elapsed, self._last_pass_s)

    def length_of(self, tokens: int) -> int:
        """The length of each sequence in this pass, given the `tokens` of all."""
        sequences = self._sequences.get(getcurrent(), 1)
        return tokens // sequences if tokens % sequences == 0 else tokens

    @contextmanager
    def root_pass(self, sequences: int = 1) -> Iterator[None]:
        """Run one forward of the root, over `sequences` sequences; all that it brought is released however it ends."""
        self._transfer.require_open()
        flow, fiber = getcurrent(), fiber_on(self)
        if flow in self._sequences:  # a part of the model, called by the model itself
            yield
            return
        if fiber is not None:
            fiber.await_pass()
        with nullcontext() if fiber is not None else self._pass():
            try:
                self._sequences[flow] = sequences
                yield
            finally:
                self._sequences.pop(flow, None)
                if fiber is not None:
                    fiber.begin_own_time()

    def scheduled_pass(self) -> AbstractContextManager[None]:
        """The pass of all fibers of a scheduler."""
        return self._pass()

    @contextmanager
    def _pass(self) -> Iterator[None]:
        self._transfer.require_open()
        with self._lock:
            start = time.perf_counter()
            try:
                self._begin()
                yield
            finally:
                self._end(time.perf_counter() - start)

    def _begin(self) -> None:
        self._transfer.require_open()
        self._take_all_away()
        self._layer, self._read_before = 0, self._transfer.bytes_read
        self._began_s = time.perf_counter()
        if self._show_progress:
            total = sum(self._bytes.values())
            self._bar = Bar(desc="layers", total=total, leave=False, unit="B", unit_scale=True, unit_divisor=1000)

    def _end(self, seconds: float) -> None:
        self._began_s, self._last_pass_s = 0.0, seconds
        self._take_all_away()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._transfer.count_pass(seconds)
        self.on_pass(seconds)

    def _take_all_away(self) -> None:
        for bound in self._units.values():  # not only those held: an interrupt may have struck between release and here
            bound.take_away()
        for scratch in self._scratches:
            scratch.reset()
        self._transfer.release_all()

    def forget(self) -> None:
        """Drop every view of the ring."""
        with self._lock:
            for bound in self._units.values():
                bound.forget()
            for scratch in self._scratches:
                scratch.forget()


def _layer_of(unit: str, layers: Sequence[str]) -> int:
    """The layer, from 1, that the unit belongs to; 0 if none."""
    return next((index for index, layer in enumerate(layers, 1) if f"{unit}.".startswith(f"{layer}.")), 0)


def guard(module: nn.Module, binding: Binding, device: torch.device) -> None:
    """Run the module's forward as a root pass, with its tensors moved to `device`. Its signature is unchanged."""
    native = module.forward

    def run(*args: object, **kwargs: object) -> Any:
        with binding.root_pass(_sequences_in(args, kwargs)):
            return native(*move(args, device), **move(kwargs, device))

    module.forward = not_compiled(run, native)


def not_compiled(run: Callable[..., Any], native: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with the name and signature of `native`. A compiler that traces a caller calls it without compiling anything inside.

    Raises CannotExportError if it would be recorded.
    """
    call = torch.compiler.disable(run, reason="streamed weights are not loaded when a compiler looks")

    @functools.wraps(native)
    def forward(*args: object, **kwargs: object) -> Any:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise CannotExportError(
                "a trace would record the current contents of the slots instead of the streamed weights: "
                "make it from transformers.AutoModelForCausalLM"
            )
        return call(*args, **kwargs)  # inside another function: torch.compile(model.forward) undoes the outermost

    return torch.compiler.disable(forward, recursive=False)  # type: ignore[no-any-return]


def _sequences_in(args: Any, kwargs: Any) -> int:
    """The number of sequences in a forward: the first dimension of its ids or embeddings."""
    inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return next((max(1, len(given)) for given in inputs if isinstance(given, torch.Tensor) and given.dim() > 1), 1)


def move(values: Any, device: torch.device) -> Any:
    """Tensors in lists, tuples and dicts, on `device`; other objects (caches, outputs) unchanged."""
    if isinstance(values, torch.Tensor):
        return values.to(device)
    if type(values) is dict:
        return {key: move(value, device) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(move(value, device) for value in values)
    return values


def _tensors_in(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif type(values) in (list, tuple, dict):
        for value in values.values() if type(values) is dict else values:
            yield from _tensors_in(value)


def refuse_gradients(name: str, module: nn.Module, args: object, kwargs: object) -> None:
    """Raise CannotTrainError if autograd would record a slot that is overwritten later."""
    if not torch.is_grad_enabled():
        return
    if any(tensor.requires_grad for tensor in (*_tensors_in((args, kwargs)), *module.parameters())):
        raise CannotTrainError(
            f"{name} would record gradients: streamed layers only run forward. "
            "Use torch.no_grad(), or train with a model that is loaded whole"
        )
