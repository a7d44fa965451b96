"""`rabbit bench MODEL`: decoding against the disk's own rate, or with speculation against without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.groups import Only, takes_groups
from rabbit_engine.cli.loading import Loading
from rabbit_engine.cli.run import encode
from rabbit_engine.errors import ConfigurationError

if TYPE_CHECKING:
    from rabbit_engine.decoding import Draft
    from rabbit_engine.diagnostics.benchmark import BenchmarkRow
    from rabbit_engine.diagnostics.speculation import SpeculationComparison
    from rabbit_engine.planning.plan import Plan
    from rabbit_engine.streaming import Span

_OPTIONS = Only("max_memory", "device", "dtype", "split", "speculate", "draft", "draft_compression")


@takes_groups
def bench(
    model: options.Model,
    *,
    loading: Annotated[Loading, _OPTIONS],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the table shows medians.")] = 5,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per round: 3; with speculation, at most this many: 48.", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to answer with speculation: how much it gains depends on it.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto or chrome://tracing.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the trace as a picture (needs the extra plot).")] = None,
    json: Annotated[bool, typer.Option(help="Also print the records as JSON lines.")] = False,
) -> None:
    """Time decoding against plain direct reads of the same bytes, and show how busy each lane was.

    With --speculate or --draft: time answers with speculation and without, and show how many tokens each pass gave.
    """
    if plot is not None:
        engine.plotting.require_matplotlib()
    guesses, keywords = loading.guesses, {name: value for name, value in loading.keywords().items() if name != "speculate"}
    if guesses is None and prompt is not None:
        raise ConfigurationError("--prompt is for --speculate and --draft: without them decoding is timed, whatever the text")
    output.note(f"loading {model} ...")
    if guesses is None:
        records, spans, plan = engine.benchmark.link(model, rounds, tokens or engine.benchmark.STEPS, **keywords)
        _print_link(records, plan)
    else:
        found = _compare(model, guesses, prompt, rounds, tokens, keywords)
        records, spans = list(found.records), found.spans
        _print_comparison(found)
    _print_lanes(spans, trace, plot, model)
    if json:
        _print_json(records)


def _compare(
    model: str, guesses: Draft | str, prompt: str | None, rounds: int, tokens: int | None, keywords: dict[str, object]
) -> SpeculationComparison:
    bench = engine.speculation
    question = prompt or bench.PROMPT
    return bench.compare(
        model, guesses, lambda streamed: encode(streamed, question, None), rounds, tokens or bench.TOKENS, **keywords
    )


def _print_link(records: Sequence[BenchmarkRow], plan: Plan) -> None:
    print(plan, engine.benchmark.as_markdown(records), sep="\n\n")
    if len(records) > 1:
        print(f"\nDecoding reads at {records[-1].rate / records[0].rate:.3f} of the disk's own rate in this run.")


def _print_comparison(found: SpeculationComparison) -> None:
    plain, speculating = found.records
    print(found.plan, engine.benchmark.as_markdown(found.records, "rounds, of one lane after the other"), sep="\n\n")
    print()
    for _, value in found.profile.rows():
        print(f"Speculation: {value}.")
    same = (
        "the same"
        if found.same_tokens is None
        else f"the same up to token {found.same_tokens}, where two logits are almost equal"
    )
    print(f"A token takes {speculating.median_s / plain.median_s:.2f} of the seconds of plain decoding; the text is {same}.")


def _print_lanes(spans: Sequence[Span], trace: Path | None, plot: Path | None, model: str) -> None:
    if trace is not None:
        engine.streaming.write_chrome_trace(spans, trace)
    if plot is not None:
        engine.plotting.plot_trace(spans, plot, model)
    print("Busy: " + ", ".join(f"{lane} {share:.1%}" for lane, share in engine.benchmark.shares(spans).items()))


def _print_json(records: Sequence[BenchmarkRow]) -> None:
    for record in records:
        print(record.as_json())
