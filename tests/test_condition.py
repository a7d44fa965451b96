"""A condition that an interrupt leaves as it should be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from rabbit_engine.utils.condition import InterruptibleCondition


def interrupted(native: Callable[..., Any]) -> Callable[..., Any]:
    """`native`, and an interrupt right after it."""

    def call(*args: Any) -> Any:
        native(*args)
        raise KeyboardInterrupt

    return call


@pytest.mark.parametrize("lock", [threading.Lock, threading.RLock])
def test_an_interrupt_between_the_release_and_the_wait_is_raised_as_it_is(lock: Callable[[], Any]) -> None:
    for kind, raised in ((threading.Condition, RuntimeError), (InterruptibleCondition, KeyboardInterrupt)):
        condition = kind(lock())
        condition._release_save = interrupted(condition._release_save)  # type: ignore[union-attr]
        with pytest.raises(raised), condition:
            condition.wait()
        taken = threading.Thread(target=lambda: condition.acquire() and condition.release())  # noqa: B023
        taken.start()
        taken.join(5)
        assert not taken.is_alive()


def test_it_waits_as_pythons_own() -> None:
    condition = InterruptibleCondition()
    assert not condition.is_owned()
    with condition:
        assert condition.is_owned()
        assert not condition.wait(0.001)
    with pytest.raises(RuntimeError, match="un-acquired"):
        condition.wait()
    assert not condition.is_owned()
