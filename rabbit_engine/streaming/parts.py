"""Runs one forward in parts, in one pass over the weights: all parts go through a layer while its units are in memory.

Each part is a fiber. A scheduler's fibers take turns at every unit, and what one has computed so far waits meanwhile; parts take
turns only between layers, so that what is live inside a layer is that of one part. For this, the ring must hold a whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

from rabbit_engine.streaming.scheduler import Fiber, UnitSource, fiber_on

LayerOf = Callable[[str], str]
"""The layer that a unit belongs to, by their names; a unit outside the layers is one by itself."""


class PassSource(UnitSource, Protocol):
    """Units, and passes over them."""

    def root_pass(self, sequences: int = 1) -> AbstractContextManager[None]:
        """A block that runs one forward: a pass, or the current fiber's share of its scheduler's pass."""
        ...


class _ForwardPart(Fiber):
    """A part of a forward: it is in the pass that its forward is in. `begin_turn` is called whenever it goes on."""

    def __init__(self, work: Callable[[], None], source: UnitSource, begin_turn: Callable[[], None]) -> None:
        super().__init__(work, source)
        self._begin_turn = begin_turn

    def resume(self) -> None:
        """See `Fiber`."""
        self._begin_turn()
        super().resume()

    def begin_own_time(self) -> None:
        """Do nothing: it has no time outside the pass."""

    def await_pass(self) -> int:
        """See `Fiber`: no other text is known to it."""
        return 0

    def await_start(self, rows: int = 0) -> int:
        """See `Fiber`."""
        return rows


def run_in_parts(
    source: PassSource, works: Sequence[Callable[[], None]], layer_of: LayerOf, begin_turn: Callable[[int], None] = lambda _: None
) -> None:
    """Run `works`, each a forward over a part of the same text, in order within every layer. Raises what one of them raises.

    `begin_turn` is called with the index of a part whenever that one goes on. Called by a fiber, the pass is its scheduler's,
    and others may share it.
    """
    with source.root_pass():
        parts = [_ForwardPart(work, source, partial(begin_turn, index)) for index, work in enumerate(works)]
        try:
            for part in parts:
                _advance(part)
            while waiting := [part for part in parts if part.wants is not None]:
                _run_layer(source, waiting, layer_of)
        except BaseException as error:
            for part in parts:
                if part.wants is not None:
                    part.stop(error)
                    part.resume()
            raise


def _run_layer(source: PassSource, waiting: Sequence[_ForwardPart], layer_of: LayerOf) -> None:
    """Run the parts that wait for a unit of the layer that the first waits for, one after another, until they leave it."""
    layer, outer, held = layer_of(_wanted(waiting[0])), fiber_on(source), set[str]()
    try:
        for part in waiting:
            while part.wants is not None and layer_of(name := _wanted(part)) == layer:
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


def _wanted(part: _ForwardPart) -> str:
    assert isinstance(part.wants, str)  # noqa: S101 - parts share no products
    return part.wants
