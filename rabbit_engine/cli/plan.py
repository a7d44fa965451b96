"""`rabbit plan MODEL`: what would be decided, before anything is downloaded or split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rabbit_engine.cli.run import parse_memory
from rabbit_engine.config import SourceConfig, SplitConfig, StreamConfig, parse_dtype, parse_max_memory, parse_planned_device
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.forecast import forecast
from rabbit_engine.plan import Speeds
from rabbit_engine.units import parse_bytes


def plan(
    model: Annotated[str, typer.Argument(help="A repo id, a folder, or a .gguf file.")],
    max_memory: Annotated[str | None, typer.Option(help="What weights may take: 8GiB, or 0=8GiB,cpu=24GiB.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens whose cache is to fit in that memory too.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda:0, mps or cpu; the default is the best there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The default is the checkpoint's own.")] = None,
    disk_rate: Annotated[
        str | None, typer.Option(help="Bytes a second of the disk, such as 5GB; the default is to measure.")
    ] = None,
    link_rate: Annotated[str | None, typer.Option(help="Bytes a second to the device, such as 13GB.")] = None,
    split: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    saving_path: Annotated[Path | None, typer.Option(help="Where the shards would go.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Which GGUF file of the folder or repo.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    token: Annotated[str | None, typer.Option(help="For gated repos; HF_TOKEN is read too.", show_default=False)] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the repository brings.")] = False,
) -> None:
    """Print what would stay in memory, what would be streamed, and what a pass would take; reads headers only.

    With --max-memory the device need not be here: --device cuda:0 --max-memory 0=8GiB,cpu=24GiB.
    """
    memory = parse_memory(max_memory)
    target = parse_planned_device(device, lambda wanted: parse_max_memory(memory, wanted)[0] is not None)
    device_budget, host_budget = parse_max_memory(memory, target)
    rates = _rates({"disk": disk_rate, "link": link_rate})
    found = forecast(
        model,
        SourceConfig(token=token, revision=revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file),
        SplitConfig(dtype=parse_dtype(dtype), saving_path=saving_path, mode=split),
        StreamConfig(
            device=target,
            device_budget_bytes=device_budget,
            host_budget_bytes=host_budget,
            max_seq_len=max_seq_len,
            speeds=Speeds(**rates, source="given") if rates else None,
        ),
    )
    table = Table(title=f"{model} on {target}", title_justify="left", show_header=False)
    for name, value in found.rows():
        table.add_row(name, value)
    Console().print(table)


def _rates(given: dict[str, str | None]) -> dict[str, float]:
    """Bytes a second by link, of those that were given."""
    rates = {}
    for link, text in given.items():
        try:
            rates[link] = float(parse_bytes(text)) if text is not None else 1.0
        except ValueError as error:
            raise ConfigurationError(f'--{link}-rate {text} is no rate; write "5GB" for 5 GB a second') from error
        if rates[link] <= 0:
            raise ConfigurationError(f"--{link}-rate {text}: nothing would ever arrive")
    return {link: rate for link, rate in rates.items() if given[link] is not None}
