"""Turns Ctrl-C into a flag during an answer, and keeps typed keys from being echoed into it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """`pressed` is set by Ctrl-C inside the `with` block, which must be in the main thread."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, _signal: int, _frame: FrameType | None) -> None:
        self.pressed = True


@contextmanager
def keys_hidden() -> Iterator[None]:
    """Do not echo typed keys; they wait for the next prompt."""
    if sys.platform == "win32":  # only echoes what is being read
        yield
        return
    import termios

    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    hidden = list(before)
    hidden[3] &= ~(termios.ECHO | termios.ICANON)
    try:
        termios.tcsetattr(handle, termios.TCSANOW, hidden)
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSANOW, before)
