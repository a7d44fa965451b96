"""The models that the server offers: each is loaded when it is first asked for, and makes room when another one is."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from rabbit_engine.errors import ConfigurationError, QueueFullError, RabbitError, SessionClosedError
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.server.descriptions import Describe, Descriptions
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.lanes import Lanes
from rabbit_engine.server.streams import seconds_of
from rabbit_engine.sessions import Session

T = TypeVar("T")

logger = logging.getLogger(__name__)

Opening = Callable[[str], AbstractContextManager[Session]]
"""Loads a model by the name that clients call it, and closes it at the end."""

FOREVER = math.inf

LATEST = ":latest"
"""What Ollama's clients append to a name without a tag."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A model that is being loaded; `expected_s` is how long it took the last time, None before the first."""

    model: str
    elapsed_s: float
    expected_s: float | None

    def facts(self) -> dict[str, object]:
        """As clients are told."""
        left_s = None if self.expected_s is None else max(0.0, self.expected_s - self.elapsed_s)
        return {"model": self.model, **seconds_of(self.elapsed_s, left_s)}


@dataclass(frozen=True, slots=True)
class Loads:
    """How often a model was loaded, and how long that took: in all, and the last time."""

    count: int = 0
    seconds: float = 0.0
    last_s: float | None = None

    def one_more(self, seconds: float) -> Loads:
        """With another one."""
        return Loads(self.count + 1, self.seconds + seconds, seconds)


class Served:
    """A loaded model. `users` requests hold it; while there are any, it is not unloaded."""

    def __init__(self, name: str, opened: AbstractContextManager[Session], keep_alive_s: float) -> None:
        self.name, self.keep_alive_s = name, keep_alive_s
        with ExitStack() as stack:
            self.session = stack.enter_context(opened)
            _ = self.session.embedder  # damaged files are an error of loading
            self._stack = stack.pop_all()
        self.lanes = Lanes(self.session)
        self.users, self.used_s = 0, time.monotonic()
        self.timer: asyncio.TimerHandle | None = None

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
        describe: Describe | None = None,
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
        self._closed, self._closing = False, threading.Lock()
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._changing: asyncio.Task[None] | None = None
        self._unloading: set[asyncio.Task[None]] = set()
        self._waiting, self._most_waiting = 0, most_waiting
        self.descriptions = Descriptions(describe)
        self._load: tuple[str, float] | None = None
        self.fixed = False
        self.loads = dict.fromkeys(names, Loads())
        """Those of each model since the server's start."""

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

    def start(self) -> None:
        """Called in the event loop before the first request: the time that loaded models may be idle begins."""
        for served in self.loaded:
            served.used_s = time.monotonic()
            self._unload_later(served)

    @property
    def loaded(self) -> list[Served]:
        """The models in memory, the one that was used last at the end."""
        return sorted(self._loaded.values(), key=lambda served: served.used_s)

    @property
    def closed(self) -> bool:
        """Whether someone closed all that is loaded."""
        return bool(self._loaded) and all(served.closed for served in self._loaded.values())

    @property
    def loading(self) -> LoadProgress | None:
        """The model that is being loaded."""
        if self._load is None:
            return None
        name, began_s = self._load
        return LoadProgress(name, time.monotonic() - began_s, self.loads[name].last_s)

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
        if keep_alive_s is not None and not self.fixed:
            served.keep_alive_s = keep_alive_s
        try:
            yield served
        finally:
            served.users -= 1
            served.used_s = time.monotonic()
            if not served.users:
                self._freed.set()
                self._unload_later(served)

    def unload(self, name: str) -> bool:
        """Unload a model as soon as nobody uses it. False for a session of the caller's, which stays."""
        if self.fixed:
            return False
        if (served := self._loaded.get(name)) is not None:
            served.keep_alive_s = 0.0
            if not served.users:
                self._unload_later(served)
        return True

    def close(self) -> None:
        """Close all models but one that its caller loaded; one that is still being loaded is closed then. Called after the server
        has stopped."""
        with self._closing:
            self._closed = True
        while self._loaded:
            self._loaded.popitem()[1].close()

    async def _take(self, name: str) -> Served:
        if name in self._loaded and (self._load is not None or not self._turn.locked()):
            return self._hold(name)  # also while another one is being loaded: there is room for both
        if self._waiting > self._most_waiting:  # besides the one that loads its model
            raise QueueFullError(f"{self._waiting} requests wait for a model already", retry_after_s=30)
        self._waiting += 1
        try:
            async with self._turn:
                if name not in self._loaded:
                    await self._bring(name)
                return self._hold(name)
        finally:
            self._waiting -= 1

    def _hold(self, name: str) -> Served:
        served = self._loaded[name]
        served.users += 1
        return served

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
        began_s = time.monotonic()
        self._load = (name, began_s)
        try:
            if len(self._loaded) >= self._most_loaded and (idle := self._idle()) is not None:
                await self._unload(idle)
            logger.info("loading %s", name)
            served = await in_thread(lambda: self._open(name))
            self.loads[name] = self.loads[name].one_more(time.monotonic() - began_s)
            self._unload_later(served)  # the request that began it may be gone
        except RabbitError as error:
            logger.warning("%s cannot be loaded: %s", name, error)
            raise RequestError(503, f"{name} cannot be loaded: {error}", code="model_not_loaded", param="model") from error
        finally:
            self._changing = self._load = None

    def _open(self, name: str) -> Served:
        """Load a model, in a thread that may outlive the server."""
        served = Served(name, self._opening(name), self._keep_alive_s)
        with self._closing:
            if not self._closed:
                self._loaded[name] = served
                return served
        served.close()
        raise SessionClosedError("the server has stopped")

    async def _unload(self, served: Served) -> None:
        logger.info("unloading %s", served.name)
        del self._loaded[served.name]
        if served.timer is not None:
            served.timer.cancel()
        await asyncio.to_thread(served.close)

    def _unload_later(self, served: Served) -> None:
        """After its time without a user, which begins anew."""
        if served.timer is not None:
            served.timer.cancel()
        if not self.fixed and served.keep_alive_s < FOREVER:
            delay = max(0.0, served.idle_until_s - time.monotonic())
            served.timer = asyncio.get_running_loop().call_later(delay, self._end_idle, served)

    def _end_idle(self, served: Served) -> None:
        task = asyncio.ensure_future(self._unload_idle(served))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _unload_idle(self, served: Served) -> None:
        async with self._turn:
            still = self._loaded.get(served.name) is served and not served.users
            if still and served.idle_until_s <= time.monotonic():
                try:
                    await self._unload(served)
                finally:
                    self._freed.set()


async def in_thread(work: Callable[[], T]) -> T:
    """The result of work that the end of the process need not wait for."""
    loop, future = asyncio.get_running_loop(), asyncio.Future[T]()

    def tell(set_it: Callable[[Any], None], found: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: None if future.done() else set_it(found))

    def run() -> None:
        try:
            tell(future.set_result, work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
            tell(future.set_exception, error)

    threading.Thread(target=run, name="rabbit-load", daemon=True).start()
    return await future
