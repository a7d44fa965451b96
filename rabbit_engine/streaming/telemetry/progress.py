"""The progress of a pass, for display while waiting for a token."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rabbit_engine.utils.bar import Bar
from rabbit_engine.utils.sizes import format_bytes, format_rate, format_seconds


@dataclass(frozen=True, slots=True)
class PassProgress:
    """A running pass: in `layer` of `layers` (0 before the first), `bytes_read` after `elapsed_s`; `expected_s` is the time of
    the previous pass, 0 in the first."""

    layer: int
    layers: int
    bytes_read: int
    elapsed_s: float
    expected_s: float = 0.0

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds until the pass ends; None if unknown."""
        if self.expected_s:
            return max(0.0, self.expected_s - self.elapsed_s)
        return self.elapsed_s * (self.layers - self.layer) / self.layer if self.layer else None

    def __str__(self) -> str:
        text = f"layer {self.layer} of {self.layers}, {format_bytes(self.bytes_read)}"
        if self.bytes_read and self.elapsed_s:
            text += f" at {format_rate(self.bytes_read, self.elapsed_s)}"
        remaining = self.remaining_s
        return text if remaining is None else f"{text}, token in {format_seconds(remaining)}"


class PassMeter:
    """Follows the running pass through the units in `sizes` (bytes by name), which belong to `layers` of the model.

    With `show_bar`, a progress bar shows it.
    """

    def __init__(self, sizes: Mapping[str, int], layers: Sequence[str] = (), *, show_bar: bool = False) -> None:
        self._sizes = sizes
        self._layers = len(layers)
        self._layer_of = {name: _layer_of(name, layers) for name in sizes}
        self._show_bar = show_bar
        self._bar: Bar | None = None
        self._layer, self._began_s, self._read_before, self._last_pass_s = 0, 0.0, 0, 0.0

    def begin(self, bytes_read: int) -> None:
        """A pass begins, after `bytes_read` in all passes before it."""
        self._layer, self._read_before = 0, bytes_read
        self._began_s = time.perf_counter()
        if self._show_bar:
            total = sum(self._sizes.values())
            self._bar = Bar(desc="layers", total=total, leave=False, unit="B", unit_scale=True, unit_divisor=1000)

    def enter(self, unit: str) -> None:
        """The pass needs `unit`."""
        layer = self._layer_of[unit]
        if layer > self._layer:
            self._layer = layer

    def leave(self, unit: str) -> None:
        """The pass has used `unit`."""
        if self._bar is not None:
            self._bar.set_postfix_str(unit, refresh=False)
            self._bar.update(self._sizes[unit])

    def end(self, seconds: float) -> None:
        """The pass has ended, after `seconds`."""
        self._began_s, self._last_pass_s = 0.0, seconds
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def progress(self, bytes_read: int) -> PassProgress | None:
        """The running pass, given the `bytes_read` in all passes; None between passes. Thread-safe."""
        began = self._began_s
        if not began:
            return None
        elapsed = time.perf_counter() - began
        return PassProgress(self._layer, self._layers, max(0, bytes_read - self._read_before), elapsed, self._last_pass_s)


def _layer_of(unit: str, layers: Sequence[str]) -> int:
    """The layer, from 1, that the unit belongs to; 0 if none."""
    return next((index for index, layer in enumerate(layers, 1) if f"{unit}.".startswith(f"{layer}.")), 0)
