"""`rabbit plan MODEL`: the plan, before anything is downloaded or split."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.loading import Loading, Only, takes_loading
from rabbit_engine.cli.wording import as_options
from rabbit_engine.utils.report import as_table
from rabbit_engine.utils.sizes import parse_rate
from rabbit_engine.utils.speeds import Speeds

_OPTIONS = Only(
    *(
        "max_memory",
        "device",
        "dtype",
        "split",
        "compression",
        "saving_path",
        "gguf_file",
        "revision",
        "token",
        "trust_remote_code",
    ),
)


@takes_loading
def plan(
    model: options.Model,
    max_seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens whose cache must fit in that memory too.")] = None,
    disk_rate: Annotated[
        str | None,
        typer.Option(callback=options.check_rate, help="Bytes per second of the disk, such as 5GB/s; measured by default."),
    ] = None,
    link_rate: Annotated[
        str | None, typer.Option(callback=options.check_rate, help="Bytes per second to the device, such as 13GB/s.")
    ] = None,
    *,
    loading: Annotated[Loading, _OPTIONS],
) -> None:
    """Print what would stay in memory, what would be streamed, and the cost of a pass; reads headers only.

    With --max-memory the device need not be present: --device cuda:0 --max-memory 0=8GiB,cpu=24GiB.
    """
    output.note(f"reading the headers of {model} ...")
    settings = engine.model.read_settings({**loading.keywords(), "max_seq_len": max_seq_len}, planned=True)
    rates = {link: float(parse_rate(rate)) for link, rate in (("disk", disk_rate), ("link", link_rate)) if rate is not None}
    stream = replace(settings.stream, speeds=Speeds(**rates, source="given") if rates else None)
    found = engine.forecast.forecast(model, settings.source, settings.split, stream)
    rows = [(name, as_options(value)) for name, value in found.rows()]
    Console(highlight=False).print(as_table(rows, f"{model} on {stream.device}"))
