"""The progress of a pass, for display while waiting for a token."""

from __future__ import annotations

from dataclasses import dataclass

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
