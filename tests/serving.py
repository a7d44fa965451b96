"""A server of a session over real HTTP, and how to ask it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import uvicorn
from pydantic import BaseModel
from smol import user
from waiting import wait_until

from rabbit_engine import Session
from rabbit_engine.server.app import create_app
from rabbit_engine.server.keys import Key

NAME = "test/smol"
SECRET = Key("all", "secret")
post, get = partial(httpx.post, timeout=60), partial(httpx.get, timeout=60)  # httpx itself gives up after 5 s
HI = {"model": NAME, "messages": user("Hi")}


@contextmanager
def running(server: uvicorn.Server) -> Iterator[int]:
    """The port of the server, which runs in a new thread."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def serving(session: Session, **keywords: Any) -> Iterator[str]:
    """The address of a server of `create_app(session, NAME, **keywords)`."""
    config = uvicorn.Config(
        create_app(session, NAME, **keywords), port=0, http="h11", log_level="warning", timeout_graceful_shutdown=3
    )
    with running(uvicorn.Server(config)) as port:
        yield f"http://127.0.0.1:{port}"


def extras(value: Any) -> Iterator[str]:
    """The fields that a value of the openai package's types has and its type does not know."""
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from extras(part)
    elif isinstance(value, BaseModel):
        yield from (f"{type(value).__name__}.{name}" for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from extras(getattr(value, name))
