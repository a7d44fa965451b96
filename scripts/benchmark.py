"""Seconds a decoded token: streamed, transformers' disk offload and resident, beside the disk's own rate.

    python scripts/benchmark.py [--folder DIR] [--layers N] [--hidden-size N] [--rounds N]

Needs room for twice the model in DIR; the last lines are the records as JSON.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from rabbit_engine.benchmark import as_markdown, decode_on_cpu


def main(
    folder: Annotated[
        Path | None, typer.Option(help="Where the model is made and kept; the default is a temporary folder.")
    ] = None,
    layers: int = 12,
    hidden_size: int = 2048,
    rounds: int = 5,
) -> None:
    """Make a random Llama, time every lane, print a table and the records."""
    with tempfile.TemporaryDirectory() as scratch:
        records = decode_on_cpu(folder or Path(scratch) / "model", layers, hidden_size, rounds)
    print(as_markdown(records))
    for record in records:
        print(record.as_json())


if __name__ == "__main__":
    typer.run(main)
