"""The server on a cluster: Ray Serve runs replicas of its application, sends each request to one, and replaces them.

A replica opens the models and builds the application as the command does on one machine. What Serve adds lies before it: a
proxy on each machine that has a replica, which passes requests and answers on as they come.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from rabbit_engine.checkpoints import Resolution
from rabbit_engine.cluster import connect
from rabbit_engine.cluster.connection import LOCAL
from rabbit_engine.cluster.machines import gather_facts, require_same_versions
from rabbit_engine.cluster.sending import Sender, serve_files
from rabbit_engine.errors import ClusterError, ConfigurationError
from rabbit_engine.model.sent_files import SentFiles, keep_files
from rabbit_engine.server.access import check_exposure, is_loopback
from rabbit_engine.server.app import create_app
from rabbit_engine.server.hosting import Host
from rabbit_engine.server.keys import Key
from rabbit_engine.server.visits import AccessLog
from rabbit_engine.utils.extras import missing_extra

_OTHER_REQUESTS = 32
"""Requests that a replica takes besides those that a session runs or queues: for pages, and to refuse with its own words."""

_RETRY_S = 10.0
_HEALTH_S, _HEALTH_TIMEOUT_S, _DRAIN_S = 5.0, 60.0, 0.5
_MOST_STARTS = 3
"""How often a replica is tried that never started, such as one whose model does not exist."""

_CLASS = re.compile(r"^(rabbit_engine|ray)\.[\w.]+: ")
_QUIET = {"enable_access_log": False}
"""Serve would log every path: the server has an access log of its own, for those who ask for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What each replica serves. It travels to other machines: `open` opens the models there, with the files of those that
    `own_files` found on the driver's, and `access_log` lies there."""

    open: Callable[[Mapping[str, SentFiles]], AbstractContextManager[Host]]
    own_files: Callable[[], Mapping[str, Resolution]] = dict
    keys: Sequence[Key] = ()
    origins: Sequence[str] = ()
    access_log: Path | None = None

    @contextmanager
    def app(self, files: Mapping[str, SentFiles], *, local: bool) -> Iterator[FastAPI]:
        """The application; the models are closed at the end."""
        log = None if self.access_log is None else AccessLog(self.access_log)
        with self.open(files) as host:
            app = create_app(host, keys=self.keys, origins=self.origins, local=local, access_log=log)
            app.add_middleware(_Mounted)
            app.state.host = host
            yield app


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """How many replicas there are, and what each has.

    Args:
        count: the number of replicas.
        cpus: the cores that each reserves, and computes with; None is as many as let all of them run.
        gpus: the GPUs that each reserves; None is one, if the cluster has any.
        share_machines: whether several may be on a machine: then each needs a limit of its memory.
        most_requests: how many requests the sessions of one run and queue.
        grace_s: how long one that is replaced may go on answering.
    """

    count: int
    cpus: float | None = None
    gpus: float | None = None
    share_machines: bool = False
    most_requests: int = 80
    grace_s: float = 600.0

    def options(self, machines: Sequence[Mapping[str, float]], free: Mapping[str, float] | None = None) -> dict[str, Any]:
        """The options of Serve for a cluster of machines with these resources, of which `free` are left in all.

        Raises ConfigurationError if there is no room.
        """
        gpus = self.gpus if self.gpus is not None else float(any(machine.get("GPU", 0) >= 1 for machine in machines))
        able = [machine for machine in machines if machine.get("GPU", 0) >= gpus]
        cpus = self.cpus if self.cpus is not None else self._most_cores(able, gpus)
        if not cpus or self._room(able, cpus, gpus) < self.count:
            raise ConfigurationError(self._no_room(machines, gpus))
        return {
            "num_replicas": self.count,
            "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
            "max_replicas_per_node": None if self.share_machines else 1,
            "max_ongoing_requests": self.most_requests + _OTHER_REQUESTS,
            "max_queued_requests": self.most_requests + _OTHER_REQUESTS,
            "graceful_shutdown_timeout_s": self.grace_s,
            "max_surge_percent": self._surge(able, free or {}, cpus, gpus),
        }

    def _surge(self, machines: Sequence[Mapping[str, float]], free: Mapping[str, float], cpus: float, gpus: float) -> int:
        """How many percent more replicas an update may start before it ends old ones: all, on a machine that has none. Those that
        share machines share memory, which two of them at once may not have."""
        has_spare = not self.share_machines and self._room(machines, cpus, gpus) > self.count
        return 100 if has_spare and free.get("CPU", 0) >= cpus and free.get("GPU", 0) >= gpus else 0

    def _most_cores(self, machines: Sequence[Mapping[str, float]], gpus: float) -> int:
        most = int(max((machine.get("CPU", 0) for machine in machines), default=0))
        return next((cores for cores in range(most, 0, -1) if self._room(machines, cores, gpus) >= self.count), 0)

    def _room(self, machines: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
        """How many replicas fit."""
        found = 0
        for machine in machines:
            most = machine.get("CPU", 0) // cpus
            most = min(most, machine.get("GPU", 0) // gpus) if gpus else most
            found += int(most if self.share_machines else min(most, 1))
        return found

    def _no_room(self, machines: Sequence[Mapping[str, float]], gpus: float) -> str:
        have = ", ".join(f"{machine.get('CPU', 0):g}" for machine in machines)
        with_gpus = f" and {sum(machine.get('GPU', 0) for machine in machines):g} GPUs" if gpus else ""
        limit = (
            "" if self.share_machines else " (one a machine, as --max-memory is not given: without it each takes all there is)"
        )
        return (
            f"{self.count} replicas do not fit{limit}: the cluster's machines have {have} cores{with_gpus}; "
            "give fewer --replicas, or --replica-cpus and --replica-gpus"
        )


class _Mounted:
    """Takes the path before the application's own off each request: a cluster may have several services."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if before := scope.get("root_path", "").rstrip("/"):
            scope = {**scope, "path": scope["path"].removeprefix(before) or "/", "root_path": ""}
        await self._app(scope, receive, send)


def deploy(address: str, name: str, offer: Offer, replicas: Replicas, *, host: str, port: int, route: str = "/") -> str:
    """Start the service `name` on the cluster at `address`, or replace the replicas of the one that runs, and return where it
    listens once all of them answer: `route` is the beginning of its paths.

    Replicas are replaced one after another: an old one gets no new requests, and ends when it has answered those it has.
    Raises ConfigurationError, MachinesDifferError, ClusterError if the replicas do not start, MissingExtraError without Serve.
    """
    if not route.startswith("/"):
        raise ConfigurationError(f"--route {route}: begin it with /")
    if not port:
        raise ConfigurationError("--port 0 is for one machine: those of a cluster listen on the same port, so give one")
    ray, serve = _connected(address)
    if address != LOCAL:
        require_same_versions(gather_facts())
    options = replicas.options([node["Resources"] for node in ray.nodes() if node["Alive"]], ray.available_resources())
    host, port = _listen(serve, host, port)
    check_exposure(host, offer.keys)
    files, senders = _send_files(ray, offer) if address != LOCAL else ({}, [])
    target = serve.deployment(
        _replica_class(serve, offer, files, local=is_loopback(host)),
        name="server",
        health_check_period_s=_HEALTH_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=_DRAIN_S,
        max_constructor_retry_count=_MOST_STARTS,
        backpressure_config={"status_code": 429, "retry_after_s": _RETRY_S},
        logging_config=_QUIET,
        **options,
    )
    try:
        serve.run(target.bind(), name=name, route_prefix=route)
    except (RuntimeError, ray.exceptions.RayError) as error:
        told = str(error) if isinstance(error, ray.exceptions.RayError) else _told(serve, name) or str(error)
        raise ClusterError(f"the service {name!r} did not start: {_reason(told)}") from error
    finally:
        senders.clear()  # which ends them: replicas that start later find other ways
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{route.rstrip('/')}/"


def withdraw(address: str, name: str) -> None:
    """End the service `name`, once it has answered what it has begun. Raises ClusterError if there is none."""
    _, serve = _connected(address)
    running = serve.status().applications
    if name not in running:
        raise ClusterError(f"no service {name!r} runs there: {', '.join(map(repr, running)) or 'none does'}")
    serve.delete(name)


def _connected(address: str) -> tuple[Any, Any]:
    """The modules `ray` and `ray.serve`."""
    ray = connect(address)
    try:
        from ray import serve
    except ImportError as error:
        raise missing_extra("a service on a cluster", "cluster", error) from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what is amiss is an error here
    return ray, serve


def _listen(serve: Any, host: str, port: int) -> tuple[str, int]:
    """The address at which Serve listens on each machine: that of a Serve that runs stays. Raises ConfigurationError if it is
    another than the one that was asked for."""
    serve.start(http_options={"host": host, "port": port}, logging_config=_QUIET)
    from ray.serve import context

    found: Any = context._get_global_client().http_config  # type: ignore[union-attr] # nothing public tells
    if (found.host, found.port) != (host, port):
        raise ConfigurationError(
            f"Serve listens on {found.host} port {found.port} of this cluster, for all services: give --host {found.host} "
            f"--port {found.port}, or end it (`serve shutdown`)"
        )
    return found.host, found.port


def _send_files(ray: Any, offer: Offer) -> tuple[dict[str, SentFiles], list[Any]]:
    """The files of the models that the driver's machine has, for machines that lack them, and the actors that read them until
    the service runs. None if the driver is no machine of the cluster."""
    if ray.util.client.ray.is_connected():
        return {}, []
    here = ray.get_runtime_context().get_node_id()
    is_alone = all(node["NodeID"] == here for node in ray.nodes() if node["Alive"])
    files, senders = {}, []
    for name, own in offer.own_files().items():
        sender = Sender(f"files of {name}, {uuid.uuid4().hex}", here)
        files[name] = keep_files(own, sender)
        if not is_alone:
            senders.append(serve_files(files[name].description, sender))
    return files, senders


def _replica_class(serve: Any, offer: Offer, files: Mapping[str, SentFiles], *, local: bool) -> Any:
    """The class of the replicas. It is defined here so that it travels with what it serves."""

    def build() -> FastAPI:
        stack = ExitStack()
        app = stack.enter_context(offer.app(files, local=local))
        app.state.close = stack.close
        return app

    class Replica:
        """Serve calls these; requests go to the application."""

        app: FastAPI

        def check_health(self) -> None:
            """Raise if the model was closed: Serve then replaces the replica."""
            if self.app.state.host.closed:
                raise RuntimeError("the model is closed")

        def __del__(self) -> None:
            """Called once after the last answer, or after a start that failed."""
            if (app := getattr(self, "app", None)) is not None:
                app.state.close()

    return serve.ingress(build)(Replica)


def _told(serve: Any, name: str) -> str:
    """What Serve keeps of the last failed start of a replica: a message with a traceback."""
    found = serve.status().applications.get(name)
    return "\n".join(deployment.message for deployment in found.deployments.values()) if found is not None else ""


def _reason(told: str) -> str:
    """The error of a traceback is its last line."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return _CLASS.sub("", lines[-1]) if lines else "Serve does not say why"


__all__ = ["LOCAL", "Offer", "Replicas", "deploy", "withdraw"]
