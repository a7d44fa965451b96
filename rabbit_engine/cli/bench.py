"""`rabbit bench MODEL`: the fraction of the disk's own rate that decoding reaches, and how busy each lane was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.loading import Loading, Only, takes_loading


@takes_loading
def bench(
    model: options.Model,
    *,
    loading: Annotated[Loading, Only("max_memory", "device", "dtype", "split")],
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; the table shows medians.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per round.")] = 3,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto or chrome://tracing.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the trace as a picture (needs the extra plot).")] = None,
    json: Annotated[bool, typer.Option(help="Also print the records as JSON lines.")] = False,
) -> None:
    """Time decoding against plain direct reads of the same bytes, and show how busy each lane was."""
    if plot is not None:
        engine.plotting.require_matplotlib()
    output.note(f"loading {model} ...")
    records, spans, plan = engine.benchmark.link(model, rounds, tokens, **loading.keywords())
    if trace is not None:
        engine.streaming.write_chrome_trace(spans, trace)
    if plot is not None:
        engine.plotting.plot_trace(spans, plot, f"{model}, {tokens} tokens")
    print(plan)
    print()
    print(engine.benchmark.as_markdown(records))
    if len(records) > 1:
        print(f"\nDecoding reads at {records[-1].rate / records[0].rate:.3f} of the disk's own rate in this run.")
    print("Busy: " + ", ".join(f"{lane} {share:.1%}" for lane, share in engine.benchmark.shares(spans).items()))
    if json:
        for record in records:
            print(record.as_json())
