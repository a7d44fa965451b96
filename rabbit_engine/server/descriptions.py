"""What the models of a host are, from their configs and headers: also of those that were never loaded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from rabbit_engine.errors import RabbitError
from rabbit_engine.model.capabilities import Capabilities

logger = logging.getLogger(__name__)

Describe = Callable[[str], Capabilities]
"""Describes a model by the name that clients call it."""

MOST_WAIT_S = 4.0
"""A list of models waits so long for what is not known yet: clients give up on one after a few seconds."""

_RETRY_S = 60.0


class Descriptions:
    """Each model is described once, when it is first asked for, one after another, and again a while after that failed."""

    def __init__(self, describe: Describe | None) -> None:
        self._describe = describe
        self._found: dict[str, Capabilities] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed_s: dict[str, float] = {}
        self._one = asyncio.Lock()

    def find(self, name: str) -> Capabilities | None:
        """What is known of a model."""
        return self._found.get(name)

    async def learn(self, names: Iterable[str]) -> None:
        """Describe models, and wait a few seconds for it; what takes longer is known later."""
        tasks = [task for name in names if (task := self._begin(name)) is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=MOST_WAIT_S)

    def _begin(self, name: str) -> asyncio.Task[None] | None:
        failed_s = self._failed_s.get(name)
        if self._describe is None or name in self._found or (failed_s is not None and time.monotonic() < failed_s + _RETRY_S):
            return None
        if name not in self._tasks:
            self._tasks[name] = asyncio.ensure_future(self._learn(name, self._describe))
        return self._tasks[name]

    async def _learn(self, name: str, describe: Describe) -> None:
        try:
            async with self._one:
                self._found[name] = await asyncio.to_thread(describe, name)
        except (RabbitError, OSError, ValueError) as error:
            self._failed_s[name] = time.monotonic()
            logger.warning("%s cannot be described: %s", name, error)
        finally:
            del self._tasks[name]
