"""Long prompts in little memory: seconds to the first token, and the memory it took, in a memory cgroup (Linux, root).

    python scripts/benchmark_long_prompts.py [--tokens 1024,8192,32768] [--limit-mb 1400]

The model has random weights and wide layers: 4 layers, hidden 256, MLP 8192, two key-value heads of 64, float32 (113 MB of
weights; 98 kB of activations and 4 kB of cache a token). transformers runs in the same group, and where the kernel kills it,
without one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers.memory_group import MemoryGroup, limited_group
from transformers import LlamaConfig, LlamaForCausalLM

ENGINES = ("rabbit", "transformers")


def main(
    tokens: Annotated[str, typer.Option(help="Lengths of prompts.")] = "1024,8192,32768",
    limit_mb: Annotated[int, typer.Option(help="The group's memory; the processes themselves take about 600 MB of it.")] = 1400,
) -> None:
    """Print a table."""
    print("| tokens | engine | memory | first token s | grown MB | parts | token |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), max(map(int, tokens.split(","))))
        for length in map(int, tokens.split(",")):
            for engine in ENGINES:
                print(row(length, engine, f"{limit_mb} MB", measure(folder, length, engine, limit_mb)), flush=True)
            print(row(length, "transformers", "unlimited", measure(folder, length, "transformers", None)), flush=True)


def make_model(folder: Path, positions: int) -> None:
    """Save the model."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=4096, num_key_value_heads=2, max_position_embeddings=positions + 64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(folder: str, tokens: int, engine: str, limit_mb: int | None) -> dict[str, Any] | None:
    """What the run printed; None if the kernel killed it."""
    command = [sys.executable, "-m", "peers.long_prompt", folder, "--tokens", str(tokens), "--engine", engine]
    with nullcontext() if limit_mb is None else limited_group("rabbit-long-prompts", limit_mb * 10**6) as group:
        joined = group.joined(command) if isinstance(group, MemoryGroup) else command
        done = subprocess.run(joined, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        if isinstance(group, MemoryGroup) and group.oom_kills():
            return None
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(tokens: int, engine: str, memory: str, found: dict[str, Any] | None) -> str:
    """A line of the table."""
    if found is None:
        return f"| {tokens} | {engine} | {memory} | killed | | | |"
    parts = ", ".join(map(str, found["parts"])) or "whole"
    figures = f"{found['seconds']:.1f} | {found['grown_bytes'] / 1e6:.0f} | {parts} | {found['token']}"
    return f"| {tokens} | {engine} | {memory} | {figures} |"


if __name__ == "__main__":
    typer.run(main)
