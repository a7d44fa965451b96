"""`rabbit serve MODEL`: an OpenAI-compatible server on this machine, or on those of a cluster."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.loading import CONVERSATION, Loading, loaded, takes_loading
from rabbit_engine.cli.prefixes import PrefixStoreSize, opened_store
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.utils.extras import missing_extra
from rabbit_engine.utils.names import read_name

if TYPE_CHECKING:
    from rabbit_engine.prefixes import PrefixStore

SERVICE, GRACE_S = "rabbit", 600.0


@takes_loading
def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Repo names, folders or GGUF files; NAME=MODEL sets what clients call it."),
    ],
    default: Annotated[str | None, typer.Option(help="The model for requests that name none; otherwise the first.")] = None,
    max_loaded: Annotated[int, typer.Option(min=1, help="Models in memory at once; others wait until one is idle.")] = 1,
    keep_alive: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which an idle model is unloaded; the default is never.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; any but loopback requires a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with the keys of clients, one a line.")] = None,
    access_log: Annotated[Path | None, typer.Option(help="A file that gets a line for each request; - is stderr.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the only model; the default is MODEL.")] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Answers generated at once; memory may allow fewer.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get status 429.")] = 64,
    max_new_tokens: options.MaxNewTokens = 1024,
    overflow: options.Overflow = "refuse",
    share_products: options.ShareProducts = False,
    continue_last: Annotated[
        bool,
        typer.Option(
            help=(
                "Keep what was computed for the last text in memory, its answer included, so that its next turn computes only "
                "what is new: for one conversation or agent at a time, but no longer bit for bit the same."
            ),
        ),
    ] = False,
    prefix_store: PrefixStoreSize = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="An origin whose web pages may use the server.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Serve from the machines of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; local starts one here. Given "
            "again, replaces the replicas that run, without losing requests.",
        ),
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=0, help="With --cluster: how many load the model and answer; 0 ends the service.")
    ] = 1,
    service: Annotated[str, typer.Option(metavar="NAME", help="With --cluster: what Ray Serve calls it.")] = SERVICE,
    route: Annotated[str, typer.Option(help="With --cluster: how its paths begin, if it runs more than one service.")] = "/",
    replica_cpus: Annotated[
        float | None, typer.Option(min=0.1, help="With --cluster: cores of each; by default as many as let all of them run.")
    ] = None,
    replica_gpus: Annotated[
        float | None, typer.Option(min=0, help="With --cluster: GPUs of each; by default one, if there are any.")
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="With --cluster: seconds in which a replica that is replaced may finish its answers.")
    ] = GRACE_S,
    *,
    loading: Annotated[Loading, CONVERSATION],
) -> None:
    """Serve models to any OpenAI client, streamed from disk; each pass over the weights serves all requests to a model."""
    named = name_models(models, name)
    try:
        listen = engine.listen
    except ImportError as error:
        raise missing_extra("rabbit serve", "serve", error) from error

    keys = [] if api_key_file is None else listen.read_keys(api_key_file)
    listen.check_exposure(host, keys)
    answering: dict[str, Any] = {
        "max_requests": max_requests,
        "max_queue": max_queue,
        "max_new_tokens": max_new_tokens,
        "overflow": overflow,
        "exact": not share_products,
        "continue_last": continue_last,
    }
    hosting: dict[str, Any] = {
        "default": default,
        "most_loaded": max_loaded,
        "keep_alive_s": math.inf if keep_alive is None else keep_alive,
        "most_waiting": max_queue,
    }
    offered = _Offered(named, loading, answering, hosting, prefix_store)
    access: dict[str, Any] = {"keys": keys, "origins": allow_origin or []}
    at: dict[str, Any] = {"host": host, "port": port}
    without_gpus = loading.device in ("cpu", "mps")
    placing: dict[str, Any] = {"cpus": replica_cpus, "gpus": replica_gpus, "grace_s": grace}
    if cluster is not None:
        offer = {"open": offered.anywhere().host, "access_log": _absolute(access_log), **access}
        most = max_requests + max_queue
        spread = {"count": replicas, "share_machines": loading.max_memory is not None, "most_requests": most, **placing}
        spread["gpus"] = 0.0 if without_gpus else replica_gpus
        _serve_on(cluster, service, offer, spread, {**at, "route": route}, partial(_tell, list(named)))
        return
    if (replicas, service, route, placing) != (1, SERVICE, "/", {"cpus": None, "gpus": None, "grace_s": GRACE_S}):
        raise ConfigurationError("--replicas, --service, --route, --replica-cpus, --replica-gpus and --grace are for --cluster")
    listen.check_port(host, port)
    log = None if access_log is None else listen.AccessLog(access_log)
    with offered.host() as hosted:
        listen.run(hosted, access_log=log, on_ready=partial(_tell, list(named)), **at, **access)


def _serve_on(
    cluster: str,
    service: str,
    offer: Mapping[str, Any],
    spread: Mapping[str, Any],
    at: Mapping[str, Any],
    on_ready: Callable[[str], None],
) -> None:
    """Start, replace or end the service of a cluster. One that was started here ends with this process."""
    serving, is_here = engine.replicas, cluster == engine.replicas.LOCAL
    if not spread["count"]:
        serving.withdraw(cluster, service)
        output.note(f"the service {service!r} has ended")
        return
    if is_here:
        engine.listen.check_port(at["host"], at["port"])
    on_ready(serving.deploy(cluster, service, serving.Offer(**offer), serving.Replicas(**spread), **at))
    if is_here:
        _wait_until_told()
        output.note("ending once all answers are complete (Ctrl-C ends at once)")
        serving.withdraw(cluster, service)


def _tell(names: Sequence[str], url: str) -> None:
    """Print where the models are served."""
    output.note(f"{', '.join(names)}: {url} (a page to chat with), {url}v1")


def _wait_until_told() -> None:
    """Wait for Ctrl-C or SIGTERM; another one then ends the process as usual."""
    told = threading.Event()
    before = {each: signal.signal(each, lambda *_: told.set()) for each in (signal.SIGINT, signal.SIGTERM)}
    told.wait()
    for each, handler in before.items():
        signal.signal(each, handler)


def _absolute(path: Path | None) -> Path | None:
    """The same file from any folder; `-` stays."""
    return path if path is None or str(path) == "-" else path.absolute()


@dataclass(frozen=True, slots=True)
class _Offered:
    """The models by the names that clients use, how they are loaded, and how sessions answer: here, or on any machine."""

    named: Mapping[str, str]
    loading: Loading
    answering: Mapping[str, Any]
    hosting: Mapping[str, Any]
    prefix_store: str | None

    @contextmanager
    def host(self) -> Iterator[engine.listen.Host]:
        """The models for a server; the only one is loaded. They are closed at the end."""
        with opened_store(self.prefix_store) as store:
            hosted = engine.listen.Host(list(self.named), self._opening(store), describe=self.describe, **self.hosting)
            if len(self.named) == 1:
                hosted.preload(hosted.default)
            with closing(hosted):
                yield hosted

    def _opening(self, store: PrefixStore | None) -> Callable[[str], Any]:
        """Opens a session with a model, which is loaded, and closed at the end."""

        @contextmanager
        def open_session(name: str) -> Iterator[engine.sessions.Session]:
            with (
                loaded(self.named[name], self.loading.for_conversations()) as streamed,
                engine.sessions.Session(streamed, prefix_store=store, **self.answering) as session,
            ):
                output.note(str(streamed.plan))
                yield session

        return open_session

    def describe(self, name: str) -> engine.capabilities.Capabilities:
        """What a model is, from its config and headers."""
        return engine.capabilities.capabilities(self.named[name], **self.loading.keywords_of_headers())

    def anywhere(self) -> _Offered:
        """The same from any folder."""
        draft, saving_path = self.loading.draft, self.loading.saving_path
        anywhere = replace(self.loading, draft=draft and _from_anywhere(draft), saving_path=_absolute(saving_path))
        return replace(self, named={name: _from_anywhere(model) for name, model in self.named.items()}, loading=anywhere)


def _from_anywhere(model: str) -> str:
    """A folder or file with its whole path; the name of a repo stays."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def name_models(given: Sequence[str], name: str | None) -> dict[str, str]:
    """The models by the names that clients use. Raises ConfigurationError for names that say nothing or are used twice."""
    if name is not None and len(given) > 1:
        raise ConfigurationError(f"--name is for one model, not for {len(given)}: write NAME=MODEL instead")
    found: dict[str, str] = {}
    for text in given:
        before, is_named, after = text.partition("=")
        called, model = (before, after) if is_named and not Path(text).exists() else (name or text, text)
        read_name(model)
        if not called:
            raise ConfigurationError(f"{text!r}: write NAME=MODEL")
        if called in found:
            raise ConfigurationError(f"two models are called {called!r}: write NAME=MODEL to set different names")
        found[called] = model
    return found
