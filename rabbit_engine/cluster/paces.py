"""How long the stages of a model take against their plan, so that a machine is named only if it is slow against the others."""

from __future__ import annotations

import threading
from collections import deque
from statistics import median

_SLOW, _PASSES = 2.0, 8
"""A stage is slow if the middle of so many passes took this many times what it would as the others do."""


_Layers = tuple[int, ...]


class StagePaces:
    """Seconds of passes by the layers of a stage, each as a multiple of what was planned. Thread-safe.

    Machines that share cores, or have other work when the model is loaded, are all slower than planned: what counts is the middle
    of the other stages, or a stage's own first passes if there are no others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passes: dict[_Layers, deque[float]] = {}
        self._first: dict[_Layers, float] = {}
        self._told: set[_Layers] = set()

    def note(self, layers: _Layers, ratio: float) -> str | None:
        """Note a pass; once, why the stage is called slow."""
        with self._lock:
            passes = self._passes.setdefault(layers, deque(maxlen=_PASSES))
            passes.append(ratio)
            own = self._middle(layers)
            if own is None or layers in self._told:
                return None
            others = [middle for each in self._passes if each != layers and (middle := self._middle(each)) is not None]
            usual = median(others) if others else self._first.setdefault(layers, own)
            if own <= _SLOW * max(1.0, usual):
                return None
            self._told.add(layers)
            compared = "the other machines take" if others else "at first it took"
            return f"{own:.1f} times what was planned, and {compared} {usual:.1f} times"

    def forget(self, layers: _Layers) -> None:
        """Begin anew: another worker has the layers."""
        with self._lock:
            self._passes.pop(layers, None)
            self._first.pop(layers, None)
            self._told.discard(layers)

    def _middle(self, layers: _Layers) -> float | None:
        passes = self._passes[layers]
        return median(passes) if len(passes) == _PASSES else None
