"""The models that the server offers: each is loaded when it is first asked for, and makes room when another one is."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext

from rabbit_engine.errors import ConfigurationError, QueueFullError, RabbitError
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.lanes import Lanes
from rabbit_engine.sessions import Session

logger = logging.getLogger(__name__)

Opening = Callable[[str], AbstractContextManager[Session]]
"""Loads a model by the name that clients call it, and closes it at the end."""

FOREVER = math.inf

LATEST = ":latest"
"""What Ollama's clients append to a name without a tag."""


class Served:
    """A loaded model. `users` requests hold it; while there are any, it is not unloaded."""

    def __init__(self, name: str, opened: AbstractContextManager[Session], keep_alive_s: float) -> None:
        self.name, self.keep_alive_s = name, keep_alive_s
        self._stack = ExitStack()
        self.session = self._stack.enter_context(opened)
        _ = self.session.embedder  # damaged files are an error of loading
        self.lanes = Lanes(self.session)
        self.users, self.used_s = 0, time.monotonic()

    @property
    def closed(self) -> bool:
        """Whether someone closed the model."""
        return runtime_of(self.session.model).transfer.closed

    @property
    def idle_until_s(self) -> float:
        """When it may be unloaded if nobody uses it, in the clock of `time.monotonic`."""
        return self.used_s + self.keep_alive_s

    def close(self) -> None:
        """Close the session and the model."""
        self.lanes.stop()
        self._stack.close()


class Host:
    """Models by name. At most `most_loaded` are in memory at once: a request for another one waits until one of them is idle,
    unloads it and loads its own; requests that come later wait their turn. An idle model is unloaded after `keep_alive_s`.

    Everything but `preload` and `close` is called in the server's event loop.
    """

    def __init__(
        self,
        names: Sequence[str],
        opening: Opening,
        *,
        default: str | None = None,
        most_loaded: int = 1,
        keep_alive_s: float = FOREVER,
        most_waiting: int = 64,
    ) -> None:
        if not names:
            raise ConfigurationError("there is no model to serve")
        if default is not None and default not in names:
            raise ConfigurationError(f"the default model {default!r} is not served: {', '.join(names)}")
        self.names = tuple(names)
        self.default = default or self.names[0]
        self.created = int(time.time())
        self._opening, self._most_loaded, self._keep_alive_s = opening, most_loaded, keep_alive_s
        self._loaded: dict[str, Served] = {}
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._changing: asyncio.Task[None] | None = None
        self._waiting, self._most_waiting = 0, most_waiting
        self.fixed = False

    @classmethod
    def of(cls, session: Session, name: str) -> Host:
        """One model that is loaded already, and that the caller closes."""
        host = cls([name], lambda _: nullcontext(session))
        host.preload(name)
        host.fixed = True
        return host

    def preload(self, name: str) -> None:
        """Load a model before the server starts, so that an error is its start's."""
        self._loaded[name] = Served(name, self._opening(name), self._keep_alive_s)

    @property
    def loaded(self) -> list[Served]:
        """The models in memory, the one that was used last at the end."""
        return sorted(self._loaded.values(), key=lambda served: served.used_s)

    @property
    def waiting(self) -> int:
        """How many requests wait for a model to be loaded."""
        return self._waiting

    def name_of(self, asked: str) -> str:
        """The name of the model that a request names, the default one if it names none. Raises RequestError."""
        return self.find(asked) if asked else self.default

    def find(self, asked: str) -> str:
        """The name of a model as clients may write it. Raises RequestError."""
        for called in dict.fromkeys((asked, asked.removesuffix(LATEST))):
            if called in self.names:
                return called
            for name in self.names:
                if called == name.rpartition("/")[2] or called.partition("@")[0] == name:
                    return name
        served = ", ".join(map(repr, self.names))
        told = f"the model {asked!r} is not served; {served} {'is' if len(self.names) == 1 else 'are'}"
        raise RequestError(404, told, code="model_not_found", param="model")

    @asynccontextmanager
    async def use(self, name: str, keep_alive_s: float | None = None) -> AsyncIterator[Served]:
        """The model, loaded, for the time of a request; `keep_alive_s` replaces how long it then stays."""
        served = await self._take(name)
        if keep_alive_s is not None:
            served.keep_alive_s = keep_alive_s
        try:
            yield served
        finally:
            served.users -= 1
            served.used_s = time.monotonic()
            if not served.users:
                self._freed.set()
                self._unload_later(served)

    def close(self) -> None:
        """Close all models but one that its caller loaded. Called after the server has stopped."""
        while self._loaded:
            self._loaded.popitem()[1].close()

    async def _take(self, name: str) -> Served:
        if self._waiting >= self._most_waiting:
            raise QueueFullError(f"{self._waiting} requests wait for a model already", retry_after_s=30)
        self._waiting += 1
        try:
            async with self._turn:
                if name not in self._loaded:
                    await self._bring(name)
                served = self._loaded[name]
                served.users += 1
                return served
        finally:
            self._waiting -= 1

    async def _bring(self, name: str) -> None:
        """Load a model, when there is room for it."""
        if self._changing is not None:  # the request that began it was cancelled
            await asyncio.wait([self._changing])
        while name not in self._loaded and len(self._loaded) >= self._most_loaded and self._idle() is None:
            self._freed.clear()
            await self._freed.wait()
        if name not in self._loaded:
            self._changing = asyncio.ensure_future(self._change(name))
            await asyncio.shield(self._changing)

    def _idle(self) -> Served | None:
        return next((served for served in self.loaded if not served.users), None)

    async def _change(self, name: str) -> None:
        """Unload an idle model if there is no room, and load this one. It is never cancelled halfway."""
        try:
            if len(self._loaded) >= self._most_loaded and (idle := self._idle()) is not None:
                await self._unload(idle)
            logger.info("loading %s", name)
            try:
                self._loaded[name] = await asyncio.to_thread(Served, name, self._opening(name), self._keep_alive_s)
            except RabbitError as error:
                raise RequestError(503, f"{name} cannot be loaded: {error}", code="model_not_loaded", param="model") from error
        finally:
            self._changing = None

    async def _unload(self, served: Served) -> None:
        logger.info("unloading %s", served.name)
        del self._loaded[served.name]
        await asyncio.to_thread(served.close)

    def _unload_later(self, served: Served) -> None:
        if not self.fixed and served.keep_alive_s < FOREVER:
            delay = max(0.0, served.idle_until_s - time.monotonic())
            asyncio.get_running_loop().call_later(delay, lambda: asyncio.ensure_future(self._unload_idle(served)))

    async def _unload_idle(self, served: Served) -> None:
        async with self._turn:
            still = self._loaded.get(served.name) is served and not served.users
            if still and served.idle_until_s <= time.monotonic():
                self._changing = asyncio.ensure_future(self._unload(served))
                await asyncio.shield(self._changing)
                self._changing = None
                self._freed.set()
