"""Listening: the application on an address, until it is told to end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import uvicorn

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.server.app import check_exposure, create_app, is_loopback
from rabbit_engine.sessions import Session

_GRACE_S = 5
"""Answers under way get so long to end when the server does."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, session: Session, on_ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._session, self._on_ready = session, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/")


def run(
    session: Session,
    name: str,
    *,
    host: str,
    port: int,
    api_key: str | None,
    origins: Sequence[str] = (),
    on_ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until Ctrl-C or SIGTERM. `on_ready` hears the address."""
    app = create_app(session, name, api_key=api_key, origins=origins, local=is_loopback(host))
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=_GRACE_S, server_header=False, lifespan="on"
    )
    _Server(config, session, on_ready).run()


def check_port(host: str, port: int) -> None:
    """Raise ConfigurationError where nobody can listen: before a model is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigurationError(f"nobody can listen on {host} port {port}: {error.strerror or error}") from error


__all__ = ["check_exposure", "check_port", "run"]
