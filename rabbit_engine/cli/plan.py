"""`rabbit plan MODEL`: the plan, before anything is downloaded or split."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.loading import Loading, Only, takes_loading
from rabbit_engine.cli.wording import as_options
from rabbit_engine.utils.report import as_table
from rabbit_engine.utils.sizes import parse_rate
from rabbit_engine.utils.speeds import Speeds

if TYPE_CHECKING:
    from rabbit_engine.model.settings import LoadSettings
    from rabbit_engine.planning.plan import Plan

_OPTIONS = Only(
    *(
        "max_memory",
        "device",
        "dtype",
        "split",
        "compression",
        "saving_path",
        "onto",
        "gguf_file",
        "revision",
        "token",
        "trust_remote_code",
        "speculate",
        "draft",
        "draft_compression",
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
    speeds = Speeds(**rates, source="given") if rates else None
    settings = replace(settings, stream=replace(settings.stream, speeds=speeds))
    rows = [(name, as_options(value)) for name, value in _forecast(model, settings, loading).rows()]
    Console(highlight=False).print(as_table(rows, f"{model} on {settings.stream.device}"))


def _forecast(model: str, settings: LoadSettings, loading: Loading) -> Plan:
    if (guesses := loading.guesses) is not None:
        return engine.model.forecast_with_draft(model, settings, guesses)
    return engine.forecast.forecast(model, settings.source, settings.split, settings.stream)
