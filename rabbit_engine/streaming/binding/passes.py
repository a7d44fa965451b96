"""Passes: forwards of the root, of which one runs at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from rabbit_engine.streaming.binding.wrapping import move, not_compiled
from rabbit_engine.streaming.scheduler import Fiber
from rabbit_engine.streaming.telemetry.progress import PassMeter, PassProgress
from rabbit_engine.streaming.transfer.transfer import Transfer


class Passes:
    """Runs passes one at a time. `release_all` is called as one begins and as it ends, however it ends.

    A pass belongs to one thread, or to a scheduler, whose fibers are several flows in one thread.
    """

    def __init__(self, transfer: Transfer, meter: PassMeter, release_all: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        """Held by a pass. Whoever runs a module outside a pass takes it as well."""
        self.on_pass: Callable[[float], None] = lambda _: None
        """Called with the seconds of each pass as it ends."""
        self._transfer, self._meter, self._release_all = transfer, meter, release_all
        self._sequences: dict[greenlet, int] = {}
        """The number of sequences in the pass of each flow, which is a greenlet; every thread has one."""

    @contextmanager
    def forward(self, sequences: int, fiber: Fiber | None) -> Iterator[None]:
        """One forward of the root over `sequences` sequences: a pass, or the part that `fiber` has in its scheduler's."""
        self._transfer.require_open()
        flow = getcurrent()
        if flow in self._sequences:  # a part of the model, called by the model itself
            yield
            return
        if fiber is not None:
            fiber.await_start()
        with nullcontext() if fiber is not None else self.run():
            try:
                self._sequences[flow] = sequences
                yield
            finally:
                self._sequences.pop(flow, None)
                if fiber is not None:
                    fiber.begin_own_time()

    @contextmanager
    def run(self) -> Iterator[None]:
        """One pass."""
        self._transfer.require_open()
        with self.lock:
            start = time.perf_counter()
            try:
                self._begin()
                yield
            finally:
                self._end(time.perf_counter() - start)

    def _begin(self) -> None:
        self._transfer.require_open()
        self._release_all()
        self._meter.begin(self._transfer.bytes_read)

    def _end(self, seconds: float) -> None:
        try:
            self._release_all()
        finally:
            self._meter.end(seconds)
        self._transfer.count_pass(seconds)
        self.on_pass(seconds)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run the block when no other thread runs a pass or a module."""
        self._transfer.require_open()
        with self.lock:
            yield

    def length_of(self, tokens: int) -> int:
        """The length of each sequence in this flow's pass, given the `tokens` of all."""
        sequences = self.sequences()
        return tokens // sequences if tokens % sequences == 0 else tokens

    def sequences(self) -> int:
        """The number of sequences in this flow's pass."""
        return self._sequences.get(getcurrent(), 1)

    def progress(self) -> PassProgress | None:
        """The progress of the running pass; None between passes. Thread-safe."""
        return self._meter.progress(self._transfer.bytes_read)


def guard(module: nn.Module, root_pass: Callable[[int], AbstractContextManager[None]], device: torch.device) -> None:
    """Run the module's forward within `root_pass(sequences)`, with its tensors moved to `device`. Its signature is unchanged."""
    native = module.forward

    def run(*args: object, **kwargs: object) -> Any:
        with root_pass(_sequences_in(args, kwargs)):
            return native(*move(args, device), **move(kwargs, device))

    module.forward = not_compiled(run, native)


def _sequences_in(args: Any, kwargs: Any) -> int:
    """The number of sequences in a forward: the first dimension of its ids or embeddings."""
    inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return next((max(1, len(given)) for given in inputs if isinstance(given, torch.Tensor) and given.dim() > 1), 1)
