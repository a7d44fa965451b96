"""Seconds of a pass by its rows: where verifying more guesses stops being free.

    python scripts/benchmark_rows.py MODEL [--memory 2.4GB] [--rows 1,2,4,8,16,32,64,128,256] [--context 256] [--dtype bfloat16]

Rounds are interleaved; the medians are printed, and each as a multiple of that of one row.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rabbit_engine import AutoModel
from rabbit_engine.transformers_bridge.forwards import cache_argument, cache_of


def seconds_of_pass(model: Any, cache: Any, rows: int, past: int) -> float:
    """One pass over `rows` tokens behind `past`, which the cache holds again afterwards."""
    ids = torch.randint(5, 1000, (1, rows), generator=torch.Generator().manual_seed(rows))
    began = time.perf_counter()
    model(input_ids=ids, use_cache=True, **cache_argument(model.forward, cache))
    seconds = time.perf_counter() - began
    cache.crop(past - int(cache.get_seq_length()))
    return seconds


def main(
    model: Annotated[Path, typer.Argument(exists=True)],
    memory: Annotated[str, typer.Option(help="For weights.")] = "2.4GB",
    rows: str = "1,2,4,8,16,32,64,128,256",
    context: Annotated[int, typer.Option(help="Tokens before the rows.")] = 256,
    rounds: int = 5,
    dtype: str = "bfloat16",
) -> None:
    """Measure, print a table and the record."""
    sizes = [int(part) for part in rows.split(",")]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    with torch.no_grad(), AutoModel.from_pretrained(model, device="cpu", dtype=dtype, max_memory={"cpu": memory}) as loaded:
        ids = torch.randint(5, 1000, (1, context), generator=torch.Generator().manual_seed(0))
        cache = cache_of(loaded(input_ids=ids, use_cache=True))
        for _ in range(rounds):
            for size in sizes:
                found[size].append(seconds_of_pass(loaded, cache, size, context))
        streamed = loaded.plan.pass_bytes
    medians = {size: statistics.median(seconds) for size, seconds in found.items()}
    print("| rows | seconds of a pass | of one row's |\n|---|---|---|")
    for size, seconds in medians.items():
        print(f"| {size} | {seconds:.3f} | {seconds / medians[sizes[0]]:.2f} |")
    print(json.dumps({"model": model.name, "memory": memory, "context": context, "pass_bytes": streamed, "rounds": found}))


if __name__ == "__main__":
    typer.run(main)
