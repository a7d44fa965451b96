"""Runs one forward in parts, in one pass over the weights: all parts go through a layer while its units are in memory.

Each part is a fiber. A scheduler's fibers take turns at every unit, and what one has computed so far waits meanwhile; parts take
turns only between layers, so that what is live inside a layer is that of one part. For this, the ring must hold a whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Protocol

from rabbit_engine.streaming.scheduler import Fiber, UnitSource, fiber_on
from rabbit_engine.streaming.stages.parts import PartHops, first_of

LayerOf = Callable[[str], str]
"""The layer that a unit belongs to, by their names; a unit outside the layers is one by itself."""


class PassSource(UnitSource, Protocol):
    """Units, and passes over them."""

    def root_pass(self, sequences: int = 1) -> AbstractContextManager[None]:
        """A block that runs one forward: a pass, or the current fiber's share of its scheduler's pass."""
        ...


class _ForwardPart(Fiber):
    """Part number `index` of a forward: it is in the pass that its forward is in. `begin_turn` is called whenever it goes on.
    Layers that run elsewhere are asked for by its `hops`."""

    def __init__(
        self, work: Callable[[], None], source: UnitSource, index: int, begin_turn: Callable[[int], None], hops: PartHops | None
    ) -> None:
        outer = fiber_on(source)
        super().__init__(work, source, shared=lambda: None if outer is None else outer.shared_pass)
        self.index, self._begin_turn, self._hops = index, begin_turn, hops

    def resume(self) -> None:
        """See `Fiber`."""
        self._begin_turn(self.index)
        super().resume()

    @property
    def hops(self) -> PartHops:
        """The way of all parts through the stages."""
        assert self._hops is not None  # noqa: S101 - given to a model with layers elsewhere
        return self._hops

    def begin_own_time(self) -> None:
        """Do nothing: it has no time outside the pass."""

    def await_pass(self) -> int:
        """See `Fiber`: no other text is known to it."""
        return 0

    def await_start(self, rows: int = 0) -> int:
        """See `Fiber`."""
        return rows


def part_on(source: UnitSource) -> _ForwardPart | None:
    """The part of a forward that runs now, if this is its source."""
    fiber = fiber_on(source)
    return fiber if isinstance(fiber, _ForwardPart) else None


def run_in_parts(
    source: PassSource,
    works: Sequence[Callable[[], None]],
    layer_of: LayerOf,
    begin_turn: Callable[[int], None] = lambda _: None,
    hops: PartHops | None = None,
) -> None:
    """Run `works`, each a forward over a part of the same text, in order within every layer. Raises what one of them raises.

    `begin_turn` is called with the index of a part whenever that one goes on. Called by a fiber, the pass is its scheduler's,
    and others may share it. A model with layers elsewhere needs `hops`.
    """
    with source.root_pass():
        parts = [_ForwardPart(work, source, index, begin_turn, hops) for index, work in enumerate(works)]
        try:
            for part in parts:
                _advance(part)
            while waiting := [part for part in parts if part.wants is not None]:
                _go_on(source, waiting, layer_of, hops)
        except BaseException as error:
            for part in parts:
                if part.wants is not None:
                    part.stop(error)
                    part.resume()
            raise


def _go_on(source: PassSource, waiting: Sequence[_ForwardPart], layer_of: LayerOf, hops: PartHops | None) -> None:
    """Resume the parts that have an answer; if none has, wait for those that are on the way, so that all parts meet at the next
    layer here; if there are none, run that layer."""
    under_way = [] if hops is None else hops.under_way  # before it is seen who has an answer: those may be more by then
    answered = [part for part in waiting if isinstance(part.wants, Future) and part.wants.done()]
    for part in answered:
        _advance(part)
    if answered and hops is not None:
        hops.send()
    elif under_way:
        _wait_for(source, first_of(under_way))
    else:
        _run_layer(source, [part for part in waiting if isinstance(part.wants, str)], layer_of)


def _wait_for(source: PassSource, future: Future[None]) -> None:
    outer = fiber_on(source)
    if outer is not None:
        outer.await_future(future)
    future.result()


def _run_layer(source: PassSource, waiting: Sequence[_ForwardPart], layer_of: LayerOf) -> None:
    """Run the parts that wait for a unit of the layer that the first waits for, one after another, until they leave it."""
    layer, outer, held = layer_of(_unit_of(waiting[0])), fiber_on(source), set[str]()
    try:
        for part in waiting:
            while isinstance(name := part.wants, str) and layer_of(name) == layer:
                if name not in held:
                    if outer is not None:
                        outer.await_unit(name)
                    source.hold(name)
                    held.add(name)
                _advance(part)
    finally:
        for name in held:
            source.let_go(name)


def _advance(part: _ForwardPart) -> None:
    """Run the part until it waits or ends. Raises what ended it."""
    part.resume()
    if part.failure is not None:
        raise part.failure


def _unit_of(part: _ForwardPart) -> str:
    assert isinstance(part.wants, str)  # noqa: S101 - parts share no products
    return part.wants
