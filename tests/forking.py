"""What happens in a forked child."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def outcome_in_a_child(work: Callable[[], Any]) -> str:
    """What `work()` raised in a forked child, "nothing", or "a hang" after twenty seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        told = "nothing"
        try:
            work()
        except BaseException as error:
            told = type(error).__name__
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told or "a hang"
