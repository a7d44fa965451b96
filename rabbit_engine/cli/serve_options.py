"""The options of `rabbit serve`, by what they are about, with their translation for the library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rabbit_engine.cli import engine, options
from rabbit_engine.cli.loading import Loading
from rabbit_engine.errors import ConfigurationError

if TYPE_CHECKING:
    from rabbit_engine.server.keys import Key


@dataclass(frozen=True, slots=True, kw_only=True)
class HostingOptions:
    """Which models are in memory."""

    default: Annotated[str | None, typer.Option(help="The model for requests that name none; otherwise the first.")] = None
    max_loaded: Annotated[int, typer.Option(min=1, help="Models in memory at once; others wait until one is idle.")] = 1
    keep_alive: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which an idle model is unloaded; the default is never.")
    ] = None

    def keywords(self, *, most_waiting: int) -> dict[str, Any]:
        """Keywords of `Host`."""
        return {
            "default": self.default,
            "most_loaded": self.max_loaded,
            "keep_alive_s": math.inf if self.keep_alive is None else self.keep_alive,
            "most_waiting": most_waiting,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ListeningOptions:
    """Where requests come in, and from whom."""

    host: Annotated[str, typer.Option(help="The address to listen on; any but loopback requires a key.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000
    api_key_file: Annotated[Path | None, typer.Option(help="A file with the keys of clients, one a line.")] = None
    access_log: Annotated[Path | None, typer.Option(help="A file that gets a line for each request; - is stderr.")] = None

    def address(self) -> dict[str, Any]:
        """Keywords of `run` and `deploy`."""
        return {"host": self.host, "port": self.port}

    def checked_keys(self) -> Sequence[Key]:
        """The keys of clients. Raises ConfigurationError if strangers could ask without one."""
        keys = [] if self.api_key_file is None else engine.listen.read_keys(self.api_key_file)
        engine.listen.check_exposure(self.host, keys)
        return keys


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweringOptions:
    """How a model answers."""

    max_requests: Annotated[int, typer.Option(min=1, help="Answers generated at once; memory may allow fewer.")] = 16
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get status 429.")] = 64
    max_new_tokens: options.MaxNewTokens = 1024
    overflow: options.Overflow = "refuse"
    share_products: options.ShareProducts = False
    continue_last: Annotated[
        bool,
        typer.Option(
            help=(
                "Keep what was computed for the last text in memory, its answer included, so that its next turn computes only "
                "what is new: for one conversation or agent at a time, but no longer bit for bit the same."
            ),
        ),
    ] = False

    def keywords(self) -> dict[str, Any]:
        """Keywords of `Session`."""
        return {
            "max_requests": self.max_requests,
            "max_queue": self.max_queue,
            "max_new_tokens": self.max_new_tokens,
            "overflow": self.overflow,
            "exact": not self.share_products,
            "continue_last": self.continue_last,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """Whether the machines of a cluster serve, and what each has."""

    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Serve from the machines of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; local starts one here. Given "
            "again, replaces the replicas that run, without losing requests.",
        ),
    ] = None
    replicas: Annotated[
        int, typer.Option(min=0, help="With --cluster: how many load the model and answer; 0 ends the service.")
    ] = 1
    service: Annotated[str, typer.Option(metavar="NAME", help="With --cluster: what Ray Serve calls it.")] = "rabbit"
    route: Annotated[str, typer.Option(help="With --cluster: how its paths begin, if it runs more than one service.")] = "/"
    replica_cpus: Annotated[
        float | None, typer.Option(min=0.1, help="With --cluster: cores of each; by default as many as let all of them run.")
    ] = None
    replica_gpus: Annotated[
        float | None, typer.Option(min=0, help="With --cluster: GPUs of each; by default one, if there are any.")
    ] = None
    grace: Annotated[
        float, typer.Option(min=0, help="With --cluster: seconds in which a replica that is replaced may finish its answers.")
    ] = 600.0

    def require_none(self) -> None:
        """Raise ConfigurationError if one was given."""
        if self != ReplicaOptions():
            raise ConfigurationError(
                "--replicas, --service, --route, --replica-cpus, --replica-gpus and --grace are for --cluster"
            )

    def settings(self, loading: Loading, *, most_requests: int) -> engine.replicas.Replicas:
        """How many replicas there are, and what each has. Its sessions run and queue `most_requests`."""
        without_gpus = loading.device in ("cpu", "mps")
        return engine.replicas.Replicas(
            count=self.replicas,
            cpus=self.replica_cpus,
            gpus=0.0 if without_gpus else self.replica_gpus,
            share_machines=loading.max_memory is not None,
            most_requests=most_requests,
            grace_s=self.grace,
        )
