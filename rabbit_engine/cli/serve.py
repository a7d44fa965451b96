"""`rabbit serve MODEL`: an OpenAI-compatible server on this machine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.loading import CONVERSATION, Loading, loaded, takes_loading
from rabbit_engine.cli.prefixes import PrefixStoreSize, opened_store
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.utils.extras import missing_extra
from rabbit_engine.utils.names import read_name


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
    listen.check_port(host, port)
    log = None if access_log is None else listen.AccessLog(access_log)

    answering: dict[str, Any] = {
        "max_requests": max_requests,
        "max_queue": max_queue,
        "max_new_tokens": max_new_tokens,
        "overflow": overflow,
        "exact": not share_products,
        "continue_last": continue_last,
    }
    with opened_store(prefix_store) as store:
        offered = _Offered(named, loading, {**answering, "prefix_store": store})
        hosted = listen.Host(
            list(named),
            offered.open,
            default=default,
            most_loaded=max_loaded,
            keep_alive_s=math.inf if keep_alive is None else keep_alive,
            most_waiting=max_queue,
            describe=offered.describe,
        )
        if len(named) == 1:
            hosted.preload(hosted.default)
        with closing(hosted):
            listen.run(
                hosted,
                host=host,
                port=port,
                keys=keys,
                access_log=log,
                origins=allow_origin or [],
                on_ready=lambda url: output.note(f"{', '.join(named)}: {url} (a page to chat with), {url}v1"),
            )


@dataclass(frozen=True, slots=True)
class _Offered:
    """The models by the names that clients use, and how sessions answer."""

    named: Mapping[str, str]
    loading: Loading
    answering: Mapping[str, Any]

    @contextmanager
    def open(self, name: str) -> Iterator[engine.sessions.Session]:
        """A session with a model, which is loaded, and closed at the end."""
        with (
            loaded(self.named[name], self.loading.for_conversations()) as streamed,
            engine.sessions.Session(streamed, **self.answering) as session,
        ):
            output.note(str(streamed.plan))
            yield session

    def describe(self, name: str) -> engine.capabilities.Capabilities:
        """What a model is, from its config and headers."""
        return engine.capabilities.capabilities(self.named[name], **self.loading.keywords_of_headers())


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
