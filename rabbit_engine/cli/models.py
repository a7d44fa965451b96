"""`rabbit models [WORDS]`: which models run, as which class, and how each was tested."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rabbit_engine.cli import engine


def models(
    words: Annotated[str, typer.Argument(help="Show only rows with these words.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the tested models, the class each runs as, and what it was compared with; other causal models may run too.

    A family that is not listed takes the generic path: its layers are found in the module tree of transformers' class.
    """
    record = engine.architectures.read_record()
    known = {entry.cls: entry.models for entry in engine.architectures.KNOWN}
    rows = [row for row in record.rows if words.lower() in f"{row.models} {row.cls} {row.runs_as} {known.get(row.cls)}".lower()]
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    Console().print(_table(rows, f"{record.date}, transformers {record.versions['transformers']}"))
    proved = {row.cls for row in record.rows}
    for family in engine.architectures.converted_families():
        if not proved.intersection(family.classes):
            Console().print(f"registered, but not tested here: {family.name} as {family.becomes}")


def _table(rows: list[engine.architectures.Proof], when: str) -> Table:
    table = Table(title="Proved models", caption=f"run on {when}", title_justify="left", caption_justify="left")
    for name in ("models", "class of the checkpoint", "runs as", "equal to"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.models, row.cls, "the same" if row.runs_as == row.cls else row.runs_as, row.oracle)
    return table
