"""Ctrl-C wherever it may strike: a KeyboardInterrupt before any line of the transfer's own code."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rabbit_engine.streaming.transfer

FOLDER = str(Path(rabbit_engine.streaming.transfer.__file__).parent)


def interrupt_at(line: int, work: Callable[[], Any]) -> bool:
    """Raise KeyboardInterrupt before the `line`th line of the transfer that `work()` runs in this thread, from 1; whether it
    ran that many.

    Not where a `with` begins or ends: Python handles no signal between a lock that was taken and its block.
    """
    remaining = line

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal remaining
        file = frame.f_code.co_filename
        if not file.startswith(FOLDER):
            return None
        if event == "line" and not linecache.getline(file, frame.f_lineno).lstrip().startswith("with "):
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
