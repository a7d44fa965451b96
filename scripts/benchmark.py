"""Seconds per decoded token: streamed, transformers' disk offload and resident, with the disk's own rate; then by budget.

    python scripts/benchmark.py [--folder DIR] [--layers N] [--hidden-size N] [--rounds N]

Needs room for twice the model in DIR; the last lines are the records as JSON. `rabbit bench MODEL` measures the link for
any model, `scripts/benchmark_peers.py` other engines, `scripts/benchmark_cuda.py` a GPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from rabbit_engine.diagnostics.benchmark import as_markdown, decode_on_cpu, residency


def main(
    folder: Annotated[
        Path | None, typer.Option(help="Where the model is written and kept; a temporary folder by default.")
    ] = None,
    layers: int = 12,
    hidden_size: int = 2048,
    rounds: int = 5,
) -> None:
    """Make a random Llama, time every lane, and print a table and the records; then repeat with growing budgets."""
    with tempfile.TemporaryDirectory() as scratch:
        target = folder or Path(scratch) / "model"
        records = decode_on_cpu(target, layers, hidden_size, rounds)
        weights = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        grown = residency(target, [weights * share // 8 for share in (1, 2, 4, 6, 7, 9)], rounds)
    for table in (records, grown):
        print(as_markdown(table))
        print()
    for record in (*records, *grown):
        print(record.as_json())


if __name__ == "__main__":
    typer.run(main)
