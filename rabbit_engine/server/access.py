"""Who may use the server: requests that name this machine, and those with the key."""

from __future__ import annotations

import hmac
import ipaddress
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.server.errors import RequestError

_OPEN_PATHS = ("/", "/health")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at that address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def check_exposure(host: str, api_key: str | None) -> None:
    """Raise ConfigurationError for a server that other machines could use without a key."""
    if api_key is None and not is_loopback(host):
        raise ConfigurationError(
            f"a server on {host} could be used by anyone who can reach this machine: give it a key with --api-key-file, "
            "or listen on 127.0.0.1"
        )


class Access:
    """Admits requests. `local` accepts only Host headers that name this machine: a foreign web page may point its own name
    here (DNS rebinding)."""

    def __init__(self, api_key: str | None, *, local: bool) -> None:
        self._api_key, self._local = api_key, local

    def admit(self, scope: Scope) -> None:
        """Raise RequestError for a request that is not allowed."""
        headers = Headers(scope=scope)
        if self._local and not _names_this_machine(headers.get("host", "")):
            raise RequestError(400, "the Host header does not name this machine: use localhost, or give the server a key")
        if self._api_key is None or scope["path"] in _OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        if not any(hmac.compare_digest(given, self._api_key.encode()) for given in _given_keys(headers)):
            raise RequestError(401, "this server requires its key: Authorization: Bearer KEY", code="invalid_api_key")


def _names_this_machine(host: str) -> bool:
    with suppress(ValueError):
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    return False


def _given_keys(headers: Headers) -> list[bytes]:
    """The keys as clients of OpenAI's and of Anthropic's API send them."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    bearer = [given.strip().encode("latin-1")] if scheme.lower() == "bearer" else []
    return [*bearer, headers.get("x-api-key", "").strip().encode("latin-1")]
