"""A condition that an interrupt leaves as it should be."""

from __future__ import annotations

import threading


class InterruptibleCondition(threading.Condition):
    """Its lock is held after `wait`, whatever that raises.

    In Python's own, an interrupt that strikes between the release of the lock and the wait leaves it released, and the `with`
    statement around raises RuntimeError in place of the interrupt.
    """

    def wait(self, timeout: float | None = None) -> bool:
        """Wait to be notified, for at most `timeout` seconds; whether it was."""
        was_owned = self.is_owned()
        try:
            return super().wait(timeout)
        except BaseException:
            if was_owned and not self.is_owned():
                self.acquire()
            raise

    def is_owned(self) -> bool:
        """Whether this thread holds the lock."""
        return bool(self._is_owned())  # type: ignore[attr-defined]
