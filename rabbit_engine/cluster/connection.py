"""Connects this process to a Ray cluster, which is the only place that knows how."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from types import ModuleType
from typing import Any

from rabbit_engine.errors import ClusterError, MachinesDifferError, first_line
from rabbit_engine.utils.extras import missing_extra

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The address of the cluster that this machine is part of, or that RAY_ADDRESS names."""

LOCAL = "local"
"""The address that starts a cluster of this machine alone, which ends with the process."""

PORT = 6379
"""The usual port of the head; that of its client server is 10001."""

_CLIENT = "ray://"
_ADDRESS = re.compile(r"(?:ray://)?(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<host>[\w.-]+)):(?P<port>\d{1,5})", re.ASCII)
_REACH_S = 10.0
_TASK_S = 60.0
_SECONDS = "RAY_gcs_server_port_wait_time_s"
"""How long Ray tries to connect to a head: once a second."""

_ENOUGH_S = 20.0
_WRONG_TOKEN = "InvalidAuthToken"  # noqa: S105 - Ray's word for it
_FAILURES = (ConnectionError, ValueError, RuntimeError, OSError)
_OPEN = (
    "The Ray cluster at %s asks for no token: anyone who reaches it can run any code on all of its machines. Use it on a trusted "
    "network only, or start all of its nodes again with RAY_AUTH_MODE=token and one token."
)


def require_ray() -> ModuleType:
    """The module `ray`. Raises MissingExtraError if it cannot be imported."""
    try:
        import ray
    except ImportError as error:
        raise missing_extra("a cluster", "cluster", error) from error
    return ray


def connect(address: str) -> ModuleType:
    """Connect to the cluster at `address`, unless this process is connected already, and return the module `ray`.

    `address` is "auto" (the cluster that this machine is part of), "HOST:PORT" of its head, "ray://HOST:PORT" of its client
    server, or "local". Requests carry the token of Ray's own authentication, from ~/.ray/auth_token or the file that
    RAY_AUTH_TOKEN_PATH names; RAY_AUTH_MODE=disabled connects without, to a cluster that was started so, and warns. Raises
    MissingExtraError without Ray, ClusterError if no cluster answers, MachinesDifferError if it has another version of Ray or
    Python.
    """
    place = _parsed(address)
    if "ray" not in sys.modules:  # which reads them as it is imported; else its own defaults hold
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to Ray's makers
    ray = require_ray()
    if ray.is_initialized():
        _require_same_cluster(ray, address, place)
        return ray
    if place is not None:
        _require_listening(address, *place)
    _join(ray, address)
    if address != LOCAL and not asks_for_token(ray):
        logger.warning(_OPEN, address)
    return ray


def asks_for_token(ray: ModuleType, timeout_s: float = _TASK_S) -> bool:
    """Whether the connected cluster lets in only who has its token. Asks one of its machines by a task.

    Raises ClusterError if none runs it within `timeout_s`.
    """

    def mode() -> str:
        import os

        return os.environ.get("RAY_AUTH_MODE", "")

    try:
        told = ray.get(ray.remote(num_cpus=0)(mode).remote(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterError(f"the cluster answers but ran no task within {timeout_s:g} s: see `ray status` on its head") from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the cluster answers but runs no task: {first_line(error)}") from error
    return bool(told.lower() == "token")


def _parsed(address: str) -> tuple[str, int] | None:
    """Host and port of an address; None for those without. Raises ClusterError."""
    if address in (AUTO, LOCAL):
        return None
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 2**16:
        raise ClusterError(
            f'{address!r} is not the address of a cluster: write "HOST:{PORT}" with the address and the port of its head, '
            '"ray://HOST:10001" for its client server, "auto" on one of its machines, or "local"'
        )
    return match["ipv6"] or match["host"], int(match["port"])


def _require_listening(address: str, host: str, port: int) -> None:
    """Ray itself tries for minutes. Raises ClusterError at once, with what the system says."""
    try:
        socket.create_connection((host, port), timeout=_REACH_S).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at {address!r} ({first_line(error)}): give the address that `ray start --head` printed there, and "
            "open its ports to this machine; see docs/cluster.md"
        ) from error


def _join(ray: ModuleType, address: str) -> None:
    try:
        _init_or_refuse(ray, address)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(
            f"no token for the cluster at {address!r}: copy that of its machines to ~/.ray/auth_token, or name its file in "
            "RAY_AUTH_TOKEN_PATH. RAY_AUTH_MODE=disabled connects to a cluster that was started without"
        ) from error
    except _FAILURES as error:
        if "ersion mismatch" in str(error):
            told = " ".join(str(error).split())
            raise MachinesDifferError(f"the cluster at {address!r} has other versions: {told}") from error
        if _is_refused(error):
            raise ClusterError(
                f"the cluster at {address!r} refuses the token {_own_token()}: copy that of its machines there"
            ) from error
        raise ClusterError(f"no Ray cluster answers at {address!r} ({first_line(error)}): {_advice(address)}") from error


def _is_refused(error: BaseException | None) -> bool:
    """Whether the token is the reason of what Ray raised, or of its cause."""
    return error is not None and (_WRONG_TOKEN in str(error) or _is_refused(error.__cause__))


def _init_or_refuse(ray: ModuleType, address: str) -> None:
    """Ray tries 20 times, also with a wrong token: let it try once, and again only if the token is not the reason.

    One try takes a second, but 40 where something listens and never answers.
    """
    if address == LOCAL or address.startswith(_CLIENT) or _SECONDS in os.environ:
        _init(ray, address)
        return
    began_s = time.monotonic()
    os.environ[_SECONDS] = "1"
    try:
        _init(ray, address)
        return
    except _FAILURES as error:
        if _is_refused(error) or time.monotonic() - began_s > _ENOUGH_S:
            raise
    finally:
        del os.environ[_SECONDS]
    _init(ray, address)


def _init(ray: ModuleType, address: str) -> None:
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, configure_logging=False, **options)


def _advice(address: str) -> str:
    if address == AUTO:
        return "start one with `ray start --head` and RAY_AUTH_MODE=token, or give the address of one that runs"
    if address == LOCAL:
        return "see Ray's messages above, and the memory that is free"
    mode = os.environ.get("RAY_AUTH_MODE", "")
    token = (
        f"the token {_own_token()} is not the cluster's"
        if mode == "token"
        else f"it asks for a token and RAY_AUTH_MODE is {mode!r}"
    )
    kind = "the client server of a head" if address.startswith(_CLIENT) else "the head of a cluster"
    return f"something listens there, but it is not {kind}, or {token}"


def _own_token() -> str:
    """Where this process has its token from."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "in RAY_AUTH_TOKEN"
    return "that RAY_AUTH_TOKEN_PATH names" if "RAY_AUTH_TOKEN_PATH" in os.environ else "in ~/.ray/auth_token"


def _require_same_cluster(ray: ModuleType, address: str, place: tuple[str, int] | None) -> None:
    """Raises ClusterError if this process is connected to another cluster than that of a head's address."""
    if place is None or address.startswith(_CLIENT) or ray.util.client.ray.is_connected():
        return  # the client does not say whose server it talks to
    connected = ray.get_runtime_context().gcs_address
    there = _parsed(connected)
    if there is None or there[1] != place[1] or not _addresses(place[0]) & _addresses(there[0]):
        raise ClusterError(
            f"this process is connected to the cluster at {connected!r}, not {address!r}: call ray.shutdown() first"
        )


def _addresses(host: str) -> set[str]:
    """The numbers of a host's name; the name itself if it has none here."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return {host}
