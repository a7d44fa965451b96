"""Runs the application at an address until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.server.access import check_exposure, is_loopback
from rabbit_engine.server.app import create_app
from rabbit_engine.server.hosting import Host
from rabbit_engine.server.keys import Key, read_keys
from rabbit_engine.server.timeouts import USUAL, Timeouts
from rabbit_engine.server.visits import AccessLog


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes connections on which no request arrives, or whose headers never end."""

    def __init__(self, *args: Any, idle_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle_s = idle_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._seen: object = None
        self._watch_timer = self.loop.call_later(self._idle_s, self._watch)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch_timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._seen is self.cycle:  # as it was at the last check
            self.transport.close()
            return
        self._seen = self.cycle if idle else self
        self._watch_timer = self.loop.call_later(self._idle_s, self._watch)


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, end_answers: Callable[[], None], on_ready: Callable[[str], None], timeouts: Timeouts
    ) -> None:
        super().__init__(config)
        self._end_answers, self._on_ready, self._timeouts = end_answers, on_ready, timeouts
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._signals += 1
        self.force_exit = self._signals > 2

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, give running answers time to finish, then end them; every client gets a last event or a status."""
        ending = asyncio.ensure_future(self._end_after_grace())
        try:
            await super().shutdown(sockets=sockets)
        finally:
            ending.cancel()

    async def _end_after_grace(self) -> None:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._timeouts.grace_s
        while loop.time() < end_s and self._signals < 2:
            await asyncio.sleep(0.05)
        self._end_answers()
        await asyncio.sleep(self._timeouts.last_words_s)
        self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/")


def run(
    models: Host,
    *,
    host: str,
    port: int,
    keys: Sequence[Key] = (),
    access_log: AccessLog | None = None,
    origins: Sequence[str] = (),
    on_ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; a second one ends running answers at once. `on_ready` is called with the address."""
    app = create_app(models, keys=keys, origins=origins, local=is_loopback(host), access_log=access_log)
    server = make_server(app, host=host, port=port, on_ready=on_ready)
    gc.collect()
    gc.freeze()  # the models that are loaded stay: garbage collection need not scan them
    server.run()


def make_server(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    on_ready: Callable[[str], None] = lambda _: None,
    timeouts: Timeouts = USUAL,
) -> uvicorn.Server:
    """A server for the application of `create_app`; a `port` of 0 takes any free one."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=partial(_Protocol, idle_s=timeouts.idle_s),  # type: ignore[arg-type] # it is only called
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(timeouts.grace_s + timeouts.last_words_s),
        server_header=False,
        lifespan="on",
    )
    return _Server(config, app.state.end_answers, on_ready, timeouts)


def check_port(host: str, port: int) -> None:
    """Raise ConfigurationError if the address is not free, before a model is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


__all__ = ["AccessLog", "Host", "check_exposure", "check_port", "make_server", "read_keys", "run"]
