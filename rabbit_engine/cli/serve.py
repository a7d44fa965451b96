"""`rabbit serve MODEL`: an OpenAI-compatible server on this machine, or on those of a cluster."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import typer

from rabbit_engine.cli import engine, output
from rabbit_engine.cli.groups import takes_groups
from rabbit_engine.cli.loading import CONVERSATION, Loading
from rabbit_engine.cli.offered import Offered, absolute, name_models
from rabbit_engine.cli.prefixes import PrefixStoreSize
from rabbit_engine.cli.serve_options import AnsweringOptions, HostingOptions, ListeningOptions, ReplicaOptions
from rabbit_engine.utils.extras import missing_extra


@takes_groups
def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Repo names, folders or GGUF files; NAME=MODEL sets what clients call it."),
    ],
    *,
    hosting: HostingOptions,
    listening: ListeningOptions,
    name: Annotated[str | None, typer.Option(help="What clients call the only model; the default is MODEL.")] = None,
    answering: AnsweringOptions,
    prefix_store: PrefixStoreSize = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="An origin whose web pages may use the server.")] = None,
    replicating: ReplicaOptions,
    loading: Annotated[Loading, CONVERSATION],
) -> None:
    """Serve models to any OpenAI client, streamed from disk; each pass over the weights serves all requests to a model."""
    named = name_models(models, name)
    _require_web_server()
    access: dict[str, Any] = {"keys": listening.checked_keys(), "origins": allow_origin or []}
    hosted = hosting.keywords(most_waiting=answering.max_queue)
    offered = Offered(named, loading, answering.keywords(), hosted, prefix_store)
    told = partial(_tell, ", ".join(named))
    if replicating.cluster is None:
        replicating.require_none()
        _serve_here(offered, listening, access, told)
    elif not replicating.replicas:
        _withdraw(replicating.cluster, replicating.service)
    else:
        anywhere = offered.anywhere()
        log = absolute(listening.access_log)
        offer = engine.replicas.Offer(open=anywhere.host_on, own_files=anywhere.own_files, access_log=log, **access)
        replicas = replicating.settings(loading, most_requests=answering.max_requests + answering.max_queue)
        at = {**listening.address(), "route": replicating.route}
        _serve_on(replicating.cluster, replicating.service, offer, replicas, at, told)


def _require_web_server() -> None:
    """Raise MissingExtraError without it."""
    try:
        _ = engine.listen
    except ImportError as error:
        raise missing_extra("rabbit serve", "serve", error) from error


def _serve_here(offered: Offered, listening: ListeningOptions, access: dict[str, Any], on_ready: Callable[[str], None]) -> None:
    """Serve on this machine until Ctrl-C or SIGTERM."""
    listen, address = engine.listen, listening.address()
    listen.check_port(**address)
    log = None if listening.access_log is None else listen.AccessLog(listening.access_log)
    with offered.host() as hosted:
        listen.run(hosted, access_log=log, on_ready=on_ready, **address, **access)


def _serve_on(
    cluster: str,
    service: str,
    offer: engine.replicas.Offer,
    replicas: engine.replicas.Replicas,
    at: Mapping[str, Any],
    on_ready: Callable[[str], None],
) -> None:
    """Start or replace the service of a cluster. One that was started here ends with this process."""
    serving, is_here = engine.replicas, cluster == engine.replicas.LOCAL
    if is_here:
        engine.listen.check_port(at["host"], at["port"])
    on_ready(serving.deploy(cluster, service, offer, replicas, **at))
    if is_here:
        _wait_until_told()
        output.note("ending once all answers are complete (Ctrl-C ends at once)")
        serving.withdraw(cluster, service)


def _withdraw(cluster: str, service: str) -> None:
    """End the service of a cluster."""
    engine.replicas.withdraw(cluster, service)
    output.note(f"the service {service!r} has ended")


def _tell(names: str, url: str) -> None:
    """Print where the models are served."""
    output.note(f"{names}: {url} (a page to chat with), {url}v1")


def _wait_until_told() -> None:
    """Wait for Ctrl-C or SIGTERM; another one then ends the process as usual."""
    told = threading.Event()
    before = {each: signal.signal(each, lambda *_: told.set()) for each in (signal.SIGINT, signal.SIGTERM)}
    told.wait()
    for each, handler in before.items():
        signal.signal(each, handler)
