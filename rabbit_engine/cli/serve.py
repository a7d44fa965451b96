"""`rabbit serve MODEL`: an OpenAI-compatible server on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.loading import CONVERSATION, Loading, loaded, takes_loading
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.utils.extras import missing_extra


@takes_loading
def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(help="The address to listen on; any but loopback requires a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="A file whose first line is the key that clients send.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; the default is MODEL.")] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Answers generated at once; memory may allow fewer.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get status 429.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For answers whose request sets no limit.")] = 1024,
    overflow: Annotated[
        Literal["refuse", "truncate"], typer.Option(help="What to do with prompts that are too long.", case_sensitive=False)
    ] = "refuse",
    share_products: Annotated[
        bool, typer.Option(help="Batch the texts of a pass: faster on a CPU, but no longer bit for bit the same.")
    ] = False,
    allow_origin: Annotated[list[str] | None, typer.Option(help="An origin whose web pages may use the server.")] = None,
    *,
    loading: Annotated[Loading, CONVERSATION],
) -> None:
    """Serve MODEL to any OpenAI client, streamed from disk; each pass over the weights serves all requests."""
    key = read_key(api_key_file)
    try:
        listen = engine.listen
    except ImportError as error:
        raise missing_extra("rabbit serve", "serve", error) from error

    listen.check_exposure(host, key)
    listen.check_port(host, port)
    with (
        loaded(model, loading.for_conversations()) as streamed,
        engine.sessions.Session(
            streamed,
            max_requests=max_requests,
            max_queue=max_queue,
            max_new_tokens=max_new_tokens,
            overflow=overflow,
            exact=not share_products,
        ) as session,
    ):
        output.note(str(streamed.plan))
        listen.run(
            session,
            name or model,
            host=host,
            port=port,
            api_key=key,
            origins=allow_origin or [],
            on_ready=lambda url: output.note(f"{name or model}: {url} (a page to chat with), {url}v1"),
        )


def read_key(path: Path | None) -> str | None:
    """The first line of the file. Raises ConfigurationError if it is empty or cannot be read."""
    if path is None:
        return None
    try:
        key = path.read_text("utf-8").split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read --api-key-file {path}: {error}") from error
    if not key:
        raise ConfigurationError(f"--api-key-file {path} begins with an empty line: put the key there")
    return key
