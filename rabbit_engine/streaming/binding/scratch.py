"""Memory that encoded weights are decoded into while their module runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rabbit_engine.errors import StreamingError
from rabbit_engine.streaming.transfer.ring import Mark, Ring
from rabbit_engine.streaming.transfer.unit import Unit


class Scratch:
    """One place for decoded weights: uint8 `memory`, which belongs to one unit at a time.

    What was decoded last stays there until another unit needs the place, so that several texts that go through a unit decode
    it once. The thread that runs the model calls, in any stream of the device.
    """

    def __init__(self, memory: torch.Tensor, ring: Ring) -> None:
        self._memory, self._ring = memory, ring
        self._last_use: Mark = None
        self._unit: Unit | None = None
        self._users = 0

    def views(self, unit: Unit) -> list[torch.Tensor]:
        """Where the encoded weights of `unit` are decoded to, in their order."""
        return unit.scratch_views(self._memory)

    @contextmanager
    def holding(self, unit: Unit, memory: torch.Tensor) -> Iterator[None]:
        """Within the block the encoded weights of `unit`, which lies in `memory`, are in its `views`.

        Raises StreamingError where another unit's are needed until later.
        """
        if self._last_use is not None:
            self._ring.wait(self._last_use)  # this thread's stream may be another one
        if self._unit is not unit:
            if self._users:
                raise StreamingError(f"{unit.name} is asked for while the weights of another unit are in its scratch memory")
            self._unit = None  # whatever interrupts the decoding leaves nobody's weights
            unit.decode_encoded(memory, self.views(unit))
            self._unit = unit
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._last_use = self._ring.last_use()

    def reset(self) -> None:
        """A pass has ended, however it ended: nobody needs what is there."""
        self._users = 0

    def forget(self) -> None:
        """Let go of the memory."""
        self._unit = self._last_use = None
        self._memory = self._memory[:0].clone()
