"""Ctrl-C wherever it may strike: a KeyboardInterrupt before any line of a part of the code."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rabbit_engine.streaming.transfer

TRANSFER = str(Path(rabbit_engine.streaming.transfer.__file__).parent)

ENDS = ("with ", "return ", "try:")


def interrupt_at(line: int, work: Callable[[], Any], within: str = TRANSFER) -> bool:
    """Raise KeyboardInterrupt before the `line`th line that `work()` runs in this thread, from 1, of the file or folder `within`;
    whether it ran that many.

    Not where a `with` begins or ends, as a `return` out of it does, or at a `try:`: Python handles no signal between a lock and
    its block, and a `try:` in it lies outside of what the `with` guards, but only for a trace.
    """
    remaining = line

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal remaining
        file = frame.f_code.co_filename
        if not file.startswith(within):
            return None
        if event == "line" and not linecache.getline(file, frame.f_lineno).lstrip().startswith(ENDS):
            remaining -= 1
            if not remaining:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
