"""`rabbit batch MODEL IN OUT`: answers a file of requests; started again, it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.groups import takes_groups
from rabbit_engine.cli.loading import CONVERSATION, Loading, loaded
from rabbit_engine.cli.prefixes import PrefixStoreSize, opened_store, require_folder
from rabbit_engine.errors import ConfigurationError

if TYPE_CHECKING:
    from rabbit_engine.batches import BatchJob, BatchProgress, Choices, Workers

_DRAW_S, _NOTE_S = 0.2, 10.0
"""How often progress is shown: on a terminal, and as a line elsewhere."""


@takes_groups
def batch(
    model: options.Model,
    input_file: Annotated[Path, typer.Argument(metavar="IN", help="JSON lines: OpenAI's batch format, or plain bodies.")],
    output_file: Annotated[Path, typer.Argument(metavar="OUT", help="Where the answers go; if it holds some, the rest follows.")],
    task: Annotated[
        Literal["chat", "complete", "embed", "classify", "rerank", "score"] | None,
        typer.Option(help="What the lines ask; by default each line's url or field tells.", case_sensitive=False),
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Texts under way at once; memory may allow fewer.")] = 256,
    max_new_tokens: options.MaxNewTokens = 1024,
    overflow: options.Overflow = "refuse",
    share_products: options.ShareProducts = False,
    prefix_store: PrefixStoreSize = None,
    retry_failed: Annotated[bool, typer.Option(help="Answer the lines again that failed before.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Answer on the machines of a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, local."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="How many load the model, each with the options for memory; one on each machine that has it."),
    ] = None,
    *,
    loading: Annotated[Loading, CONVERSATION],
) -> None:
    """Answer every line of IN with MODEL, into OUT: each pass over the weights serves as many as memory holds.

    Killed at any moment and started again, it goes on: OUT says which lines are answered. A line that cannot be answered
    gets an error, and the others go on.
    """
    if workers is not None and cluster is None:
        raise ConfigurationError(f"--workers {workers} is for a cluster: give its address with --cluster")
    choices = engine.batches.Choices(
        task=task,
        max_requests=max_requests,
        max_new_tokens=max_new_tokens,
        overflow=overflow,
        exact=not share_products,
        retry_failed=retry_failed,
    )
    keywords = {"dtype": loading.dtype, "compression": loading.compression, "revision": loading.revision}
    opened = engine.batches.BatchJob(model, input_file, output_file, choices, {**keywords, "gguf_file": loading.gguf_file})
    with opened:
        if opened.resumed:
            output.note(f"{output_file} answers {opened.resumed} lines already")
        if opened.retried:
            output.note(f"{opened.retried} failed before: answered again")
        if not opened.is_done and cluster is not None:
            _run_on(engine.batches.Workers(cluster, workers), opened, model, choices, loading, prefix_store)
        elif not opened.is_done:
            with (
                loaded(model, loading.for_conversations()) as streamed,
                opened_store(prefix_store, repeated_only=True) as store,
                _told() as tell,
            ):
                opened.run(streamed, tell, prefix_store=store)
        output.note(str(opened.report()))


def _run_on(workers: Workers, opened: BatchJob, model: str, choices: Choices, loading: Loading, prefix_store: str | None) -> None:
    """Answer with workers on a cluster, whose machines keep prefixes as this one would."""
    keywords = loading.for_conversations().keywords()
    order = engine.batches.Order.of(model, choices, keywords, require_folder(prefix_store))
    output.note(f"loading {model} on the cluster at {workers.address} ...")
    with _told() as tell:
        opened.run_on(workers, order, tell)


@contextmanager
def _told() -> Iterator[Callable[[BatchProgress], None]]:
    """Tells progress on stderr: in one line that changes on a terminal, else in a line every ten seconds."""
    on_terminal, told_s, width = sys.stderr.isatty(), time.monotonic(), 0

    def tell(progress: BatchProgress) -> None:
        nonlocal told_s, width
        if time.monotonic() - told_s < (_DRAW_S if on_terminal else _NOTE_S):
            return
        told_s, text = time.monotonic(), str(progress)
        if on_terminal:
            width = max(width, len(text))
            typer.echo(f"\r{text:{width}}", err=True, nl=False)
        else:
            output.note(text)

    try:
        yield tell
    finally:
        if width:
            output.note("")
