"""Errors of code that is not ours and may raise anything: of models and configs, templates, decoders of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rabbit_engine.errors import RabbitError


@contextmanager
def foreign_code(told: Callable[[Exception], RabbitError]) -> Iterator[None]:
    """Raise `told(error)` for whatever is raised inside. Our own errors stay, and a lack of memory, which is not that code's
    fault."""
    try:
        yield
    except (MemoryError, RabbitError):
        raise
    except Exception as error:
        raise told(error) from error
