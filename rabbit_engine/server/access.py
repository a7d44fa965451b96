"""Who may use the server: requests that name this machine, and those with a key whose limits are not reached."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.keys import Key

OPEN_PATHS = ("/", "/health")
"""Paths that need no key."""

_MINUTE_S = 60.0
_BUSY_RETRY_S = 10.0
"""When a client with all its requests under way may try again: when one ends is not known."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at that address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def check_exposure(host: str, keys: Sequence[Key]) -> None:
    """Raise ConfigurationError for a server that other machines could use without a key."""
    if not keys and not is_loopback(host):
        raise ConfigurationError(
            f"a server on {host} could be used by anyone who can reach this machine: give it a key with --api-key-file, "
            "or listen on 127.0.0.1"
        )


class Access:
    """Admits requests. `local` accepts only Host headers that name this machine: a foreign web page may point its own name
    here (DNS rebinding)."""

    def __init__(self, keys: Sequence[Key] = (), *, local: bool) -> None:
        self._local = local
        self._holders = [_Holder(key) for key in keys]

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return bool(self._holders)

    @contextmanager
    def admitting(self, scope: Scope) -> Iterator[str]:
        """The name of the key that a request came with, empty if it needs none; a request that asks a model (POST) counts
        towards the key's limits until the block ends. Raises RequestError for a request that is not allowed."""
        headers = Headers(scope=scope)
        if self._local and not _names_this_machine(headers.get("host", "")):
            raise RequestError(400, "the Host header does not name this machine: use localhost, or give the server a key")
        if not self._holders or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            yield ""
            return
        holder = self._holder_of(_given_keys(headers))
        if scope["method"] != "POST":
            yield holder.key.name
            return
        with holder.using():
            yield holder.key.name

    def _holder_of(self, given: Sequence[bytes]) -> _Holder:
        """Compares with every key, so that the time says nothing about them."""
        found = None
        for holder in self._holders:
            for each in given:
                if hmac.compare_digest(each, holder.key.secret.encode()):
                    found = holder
        if found is None:
            raise RequestError(401, "this server requires its key: Authorization: Bearer KEY", code="invalid_api_key")
        return found


class _Holder:
    """Counts the requests of one key."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self._running = 0
        self._began_s: deque[float] = deque(maxlen=key.per_minute or 0)

    @contextmanager
    def using(self) -> Iterator[None]:
        """One request. Raises RequestError if it is one too many."""
        most, now = self.key.requests, time.monotonic()
        if most is not None and self._running >= most:
            told = f"{self._running} requests of the key {self.key.name!r} are under way, and no more are allowed: wait for one"
            raise RequestError(429, told, code="too_many_requests", retry_after_s=_BUSY_RETRY_S)
        if self.key.per_minute is not None and len(self._began_s) == self.key.per_minute:
            wait_s = self._began_s[0] + _MINUTE_S - now
            if wait_s > 0:
                told = f"the key {self.key.name!r} may begin {self.key.per_minute} requests a minute: wait {wait_s:.0f} s"
                raise RequestError(429, told, code="rate_limit_exceeded", retry_after_s=wait_s)
        self._began_s.append(now)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


def _names_this_machine(host: str) -> bool:
    with suppress(ValueError):
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    return False


def _given_keys(headers: Headers) -> list[bytes]:
    """The keys as clients of OpenAI's and of Anthropic's API send them."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    bearer = [given.strip().encode("latin-1")] if scheme.lower() == "bearer" else []
    return [*bearer, headers.get("x-api-key", "").strip().encode("latin-1")]
