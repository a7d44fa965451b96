"""`rabbit doctor`: what this machine has, what to fix, and which models would run here at what speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rabbit_engine import __version__
from rabbit_engine.cli import engine
from rabbit_engine.utils.sizes import format_bytes, format_rate, format_seconds

_QUICK_BYTES, _QUICK_ROUNDS = 2**28, 3
_NOTES = (
    "From: the least memory, with a text of 1024 tokens. A range: from as many experts cached as possible to none. "
    '4-bit: a token with compression="4bit", and the size of that.'
)
_COLOURS = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}


def doctor(
    folder: Annotated[
        Path | None,
        typer.Option(help="Where weights would go; the default is the Hugging Face cache.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read 256 MiB three times, not 1 GiB five times.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help='Check the machines of a Ray cluster: "auto", HOST:PORT of its head, or ray://HOST:PORT.'
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check versions, devices and memory, measure the disk and the link, and show what to fix and how fast models would run.

    Reads a large file in the folder, or else a scratch file of 1 GiB that it writes there and deletes. Exit code 1 if models
    cannot run. With --cluster, every machine does so, the folder is a path on each, and the links between them are measured.
    """
    if cluster is not None:
        _check_cluster(cluster, folder, quick, as_json)
        return
    place = engine.doctor.find_folder(folder)
    size, rounds = engine.disk_rate.SAMPLE_BYTES, engine.disk_rate.ROUNDS
    with Console(stderr=True).status(f"reading from the disk of {place} ..."):
        found = engine.doctor.examine(place, *((_QUICK_BYTES, _QUICK_ROUNDS) if quick else (size, rounds)))
    _report(found, as_json)
    if not as_json:
        _print_paces(found)
    _exit_with(found)


def _check_cluster(address: str, folder: Path | None, quick: bool, as_json: bool) -> None:
    with Console(stderr=True).status(f"asking the machines of the cluster at {address} ..."):
        size = _QUICK_BYTES if quick else engine.disk_rate.SAMPLE_BYTES
        found = engine.cluster.examine_cluster(address, None if folder is None else str(folder), size)
    _report(found, as_json)
    _exit_with(found)


def _report(found: engine.finding.Examination, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        Console(highlight=False).print(_findings_table(found.findings))


def _exit_with(found: engine.finding.Examination) -> None:
    if not found.can_run:
        raise typer.Exit(1)


def _print_paces(found: engine.doctor.Diagnosis) -> None:
    if not found.paces:
        return
    console = Console(highlight=False)
    console.print()
    console.print(_paces_table(found))
    console.print(_NOTES)
    large = [pace.model for pace in found.paces if pace.weights_bytes > found.disk_free_bytes]
    if large:
        console.print(f"Larger than the {format_bytes(found.disk_free_bytes)} free in the folder: {', '.join(large)}.")


def _findings_table(findings: tuple[engine.finding.Finding, ...]) -> Table:
    table = Table(title=f"rabbit {__version__}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        words = Text(finding.value)
        if finding.advice:
            words.append(f"\n-> {finding.advice}", style="bold")
        table.add_row(Text(finding.status, style=_COLOURS[finding.status]), finding.name, words)
    return table


def _paces_table(found: engine.doctor.Diagnosis) -> Table:
    rate = f"{format_rate(found.speeds.disk, 1)} ({found.speeds.source})"
    title = f"bf16 on {found.device}, in the memory free now, from a disk of {rate}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("model", "weights", "from", "a token, about", "bound", "4-bit"):
        table.add_column(name)
    for pace in found.paces:
        table.add_row(*_pace_row(pace))
    return table


def _pace_row(pace: engine.pace.Pace) -> tuple[str, ...]:
    bounds = pace.token_s or ()
    token = " - ".join(dict.fromkeys(map(format_seconds, bounds)))
    four_bit = "-" if pace.four_bit_token_s is None else format_seconds(pace.four_bit_token_s)
    sizes = [f"{count / 1e9:.3g} GB" for count in (pace.weights_bytes, pace.smallest_bytes, pace.four_bit_bytes)]
    return pace.model, sizes[0], sizes[1], token or "-", pace.bound, f"{four_bit} ({sizes[2]})"
