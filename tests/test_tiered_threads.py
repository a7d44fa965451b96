"""Caches in tiers and threads: what readers hold, interrupts, forked children, ends."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from forking import outcome_in_a_child
from interrupting import interrupt_at
from test_tiered_caches import LAYERS, states, tiered, update
from transformers.cache_utils import DynamicCache

import rabbit_engine.streaming.caches
from rabbit_engine.streaming.caches import layers as tiered_layers
from rabbit_engine.streaming.caches.mover import Arrival
from rabbit_engine.streaming.transfer.reader import shared_reader
from rabbit_engine.transformers_bridge.tiered import TieredCache


def grow(cache: TieredCache, tokens: int) -> None:
    """A pass over all layers."""
    for index in range(LAYERS):
        cache.update(*states(1, tokens), index)


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt amid a finalizer

CACHES = str(Path(rabbit_engine.streaming.caches.__file__).parent)


def test_idle_readers_hold_no_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals: list[weakref.ref[Arrival]] = []

    class Noted(Arrival):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            arrivals.append(weakref.ref(self))

    monkeypatch.setattr(tiered_layers, "Arrival", Noted)
    ours = tiered(tmp_path, 4)
    for _ in range(20):
        grow(ours, 5)
    held = [arrival() for arrival in arrivals if arrival() is not None]
    assert held == [ours.layers[0].states._ahead]
    ours.text.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.parametrize("which", ["a pass", "dropped"])
def test_a_forked_child_gets_an_error_even_if_the_lock_was_held(tmp_path: Path, which: str) -> None:
    ours = tiered(tmp_path, 4)
    for _ in range(3):
        grow(ours, 20)
    locked, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with shared_reader().lock:
            locked.set()
            forked.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    try:
        work = (lambda: grow(ours, 1)) if which == "a pass" else lambda: ours.reset()
        assert outcome_in_a_child(work) == ("ModelClosedError" if which == "a pass" else "nothing")
    finally:
        forked.set()
        thread.join()
    grow(ours, 3)
    ours.text.close()


def test_an_interrupt_anywhere_leaves_a_cache_that_can_be_closed(tmp_path: Path) -> None:
    line, was_interrupted = 0, True
    descriptors = _descriptors()
    while was_interrupted:
        line += 13
        ours = tiered(tmp_path, 4)
        for _ in range(2):
            grow(ours, 11)
        was_interrupted = interrupt_at(line, lambda: [grow(ours, 9) for _ in range(2)], CACHES)  # noqa: B023
        text = ours.text
        ours.crop(-ours.get_seq_length())
        ours.reset()
        theirs = DynamicCache()
        for _ in range(2):
            update((ours, theirs), 1, 10)
        del ours
        text.close()
    assert line > 150
    assert _descriptors() == descriptors


def test_an_interrupt_of_the_end_is_made_good_by_the_next(tmp_path: Path) -> None:
    descriptors, line, was_interrupted = _descriptors(), 0, True
    while was_interrupted:
        line += 1
        ours = tiered(tmp_path, 4)
        grow(ours, 30)
        was_interrupted = interrupt_at(line, ours.text.close, CACHES)
        ours.text.close()
    assert line > 5
    assert _descriptors() == descriptors


def test_an_interrupt_of_the_beginning_leaves_no_queue(tmp_path: Path) -> None:
    line, was_interrupted, others = 0, True, list(shared_reader()._queues)  # of models that other tests share
    while was_interrupted:
        line += 1
        was_interrupted = interrupt_at(line, lambda: tiered(tmp_path, 4).text.close(), CACHES)
        assert shared_reader()._queues == others
    assert line > 10


def _descriptors() -> int:
    gc.collect()
    folder = Path("/proc/self/fd")
    return sum(1 for _ in folder.iterdir()) if folder.exists() else 0


def test_nothing_is_left_of_texts(tmp_path: Path) -> None:
    before, others = _descriptors(), list(shared_reader()._queues)
    for _ in range(20):
        ours = tiered(tmp_path, 4)
        for _ in range(2):
            grow(ours, 30)
        del ours
    assert _descriptors() == before
    assert shared_reader()._queues == others
