"""`rabbit bench MODEL`: how much of the disk's own rate decoding gets, with a picture of what was busy when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rabbit_engine.benchmark import as_markdown, link, shares
from rabbit_engine.cli.run import parse_memory
from rabbit_engine.plotting import plot_trace
from rabbit_engine.streaming import write_chrome_trace


def bench(
    model: Annotated[str, typer.Argument(help="A repo id, a folder, or a .gguf file.")],
    max_memory: Annotated[str | None, typer.Option(help="What weights may take: 8GiB, or 0=8GiB,cpu=24GiB.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda:0, mps or cpu; the default is the best there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The default is the checkpoint's own.")] = None,
    split: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; the table holds medians.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens a round.")] = 3,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto or chrome://tracing.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the same as a picture (needs the extra plot).")] = None,
    json: Annotated[bool, typer.Option(help="Print the records as JSON lines behind the table.")] = False,
) -> None:
    """Time decoding beside plain direct reads of the same bytes, and tell which lane was busy for how much of the time."""
    records, spans, plan = link(
        model, rounds, tokens, max_memory=parse_memory(max_memory), device=device, dtype=dtype, split=split
    )
    if trace is not None:
        write_chrome_trace(spans, trace)
    if plot is not None:
        plot_trace(spans, plot, f"{model}, {tokens} tokens")
    print(plan)
    print()
    print(as_markdown(records))
    if len(records) > 1:
        print(f"\nDecoding reads at {records[-1].rate / records[0].rate:.3f} of the disk's own rate in this run.")
    print("Busy: " + ", ".join(f"{lane} {share:.1%}" for lane, share in shares(spans).items()))
    if json:
        for record in records:
            print(record.as_json())
