"""Long texts in little memory: tokens behind caches on disk, prompts, and texts with a common beginning (Linux, root).

python scripts/benchmark_long_texts.py tokens MODEL [--behind 1024,4096,16384,65536] [--limit-mb 1000] [--max-memory-mb 150]
python scripts/benchmark_long_texts.py prompts [--lengths 1024,4096,16384,65536] [--limit-mb 1000] [--model MODEL]
python scripts/benchmark_long_texts.py beginnings MODEL [--texts 32] [--common 2000] [--max-memory 150MB] [--rounds 5]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers.memory_group import limited_group
from transformers import LlamaConfig, LlamaForCausalLM

from rabbit_engine import AutoModel, PrefixStore, Session
from rabbit_engine.model.protocols import SessionModel

Model = Annotated[str, typer.Argument(help="A model's folder.")]
LimitMb = Annotated[int, typer.Option(help="The memory group's limit, page cache included.")]
Found = dict[str, Any] | None

VOCABULARY = 4096

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def tokens(
    model: Model,
    behind: Annotated[str, typer.Option(help="Tokens in the cache, random states.")] = "1024,4096,16384,65536",
    limit_mb: LimitMb = 1000,
    max_memory_mb: Annotated[int, typer.Option(help="Memory for weights; 0 leaves it to the library.")] = 150,
    rounds: Annotated[int, typer.Option(help="Processes for each length.")] = 3,
    encoded: Annotated[bool, typer.Option(help="Keep keys and values in eight bits.")] = False,
    pieces: Annotated[bool, typer.Option(help="Attend to layers in pieces.")] = False,
) -> None:
    """Seconds a token behind a cache on disk, and what the disk's rate in the same process allows."""
    print("| tokens before | s a token | weights MB | cache MB | GB/s | disk GB/s | of the limit | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    options = [f"--max-memory={max_memory_mb * 10**6}"] * bool(max_memory_mb) + ["--encoded"] * encoded + ["--pieces"] * pieces
    for length in behind.split(","):
        command = ["peers.long_text", str(Path(model).resolve()), "--behind", length, *options]
        print(f"| {int(length):,} | {token_row([measure(command, limit_mb) for _ in range(rounds)])} |", flush=True)


def token_row(found: list[Found]) -> str:
    """Medians over all tokens of all processes."""
    alive = [one for one in found if one is not None]
    if len(alive) < len(found):
        return "killed | | | | | |"
    steps = [step for one in alive for step in one["steps"]]
    seconds, read, cached = (statistics.median(s[key] for s in steps) for key in ("seconds", "read_bytes", "cache_bytes"))
    disk = statistics.median(one["disk_rate"] for one in alive)
    peak = max(one["group_bytes"] for one in alive)
    rates = f"{read / seconds / 1e9:.2f} | {disk / 1e9:.2f} | {read / disk / seconds:.2f}"
    return f"{seconds:.3f} | {(read - cached) / 1e6:.0f} | {cached / 1e6:.0f} | {rates} | {peak / 1e6:.0f}"


@app.command()
def prompts(
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "1024,4096,16384,65536",
    limit_mb: LimitMb = 1000,
    engines: Annotated[
        str, typer.Option(help="Those of peers/long_prompt.py, and llama.cpp (needs xllamacpp and gguf).")
    ] = "rabbit,transformers,offloaded",
    model: Annotated[
        Path | None, typer.Option(help="A model's folder, in place of a random Llama with 16 kB of cache a token.")
    ] = None,
    offload_mb: Annotated[int, typer.Option(help="Memory that transformers' disk offload gets for weights.")] = 30,
) -> None:
    """Seconds to the first token, and the peak of the memory group."""
    print("| tokens | engine | first token s | peak MB | parts | layers on disk | token |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) if model is None else model.resolve()
        if model is None:
            make_model(folder, max(map(int, lengths.split(","))))
        for length in lengths.split(","):
            for engine in engines.split(","):
                found = measure(prompt_command(folder, length, engine, offload_mb), limit_mb)
                print(f"| {int(length):,} | {engine} | {prompt_row(found)} |", flush=True)


def prompt_command(folder: Path, length: str, engine: str, offload_mb: int) -> list[str]:
    """The module of peers that measures a prompt, and its arguments."""
    if engine != "llama.cpp":
        return ["peers.long_prompt", str(folder), "--tokens", length, "--engine", engine, f"--offload-mb={offload_mb}"]
    file = folder / "model.gguf"
    if not file.exists():
        from peers.write_gguf import write_gguf

        write_gguf(folder, file)
    return ["peers.long_prompt_llama", str(file), "--tokens", length, "--vocabulary", str(VOCABULARY)]


def make_model(folder: Path, positions: int) -> None:
    """Eight layers, hidden 256, four key-value heads of 64, float32."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, max_position_embeddings=positions + 64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def prompt_row(found: Found) -> str:
    """What a run printed."""
    if found is None:
        return "killed | | | |"
    parts = found["parts"][-1] if found["parts"] else "whole"
    return f"{found['seconds']:.1f} | {found['group_bytes'] / 1e6:.0f} | {parts} | {found['tiered']} | {found['token']}"


@app.command()
def beginnings(
    model: Model,
    texts: Annotated[int, typer.Option(help="Texts.")] = 32,
    common: Annotated[int, typer.Option(help="Tokens with which all of them begin.")] = 2000,
    own: Annotated[int, typer.Option(help="Tokens that each adds.")] = 50,
    new: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    max_memory: Annotated[str | None, typer.Option(help="Memory for weights.")] = None,
    rounds: Annotated[int, typer.Option(help="How often all stores take turns; medians are printed.")] = 1,
) -> None:
    """Texts with a common beginning in one session: without a prefix store, with an empty one, with one that has that beginning
    from another text, and with one that has all of them."""
    memory: dict[int | str, int | str] | None = {"cpu": max_memory} if max_memory else None
    taken: dict[str, list[Batch]] = {"none": [], "empty": [], "the beginning": [], "all of them": []}
    with AutoModel.from_pretrained(model, device="cpu", max_memory=memory) as loaded:
        ids = torch.randint(5, loaded.config.vocab_size, (common + texts * own,), generator=torch.Generator().manual_seed(1))
        start, rest = ids[:common].tolist(), ids[common:].view(texts, own).tolist()
        for number in range(rounds):
            with (
                tempfile.TemporaryDirectory() as folder,
                PrefixStore(Path(folder) / "whole", 10**11) as whole,
                PrefixStore(Path(folder) / "start", 10**11) as begun,
            ):
                stores = {"none": None, "empty": whole, "the beginning": begun, "all of them": whole}
                run_batch(loaded, [start], 1, begun)
                for name, store in stores.items():
                    whole.flush(), begun.flush()
                    found = run_batch(loaded, [start + more for more in rest], new, store)
                    taken[name].append(found)
                    print(f"round {number + 1}, {name}: {found.seconds:.1f} s, {found.cpu_s:.1f} of the CPU", file=sys.stderr)
    print("| store | s | s of the CPU | passes | tokens not computed | equal |\n|---|---|---|---|---|---|")
    wanted = taken["none"][0].answers
    for name, batches in taken.items():
        seconds, cpu_s = (statistics.median(getattr(one, kind) for one in batches) for kind in ("seconds", "cpu_s"))
        last, equal = batches[-1], all(one.answers == wanted for one in batches)
        print(f"| {name} | {seconds:.1f} | {cpu_s:.1f} | {last.passes} | {last.cached_tokens:,} | {equal} |")


@dataclass(frozen=True)
class Batch:
    """Texts that were answered at once."""

    seconds: float
    cpu_s: float
    passes: int
    cached_tokens: int
    answers: list[tuple[int, ...]]


def run_batch(model: SessionModel, prompts: list[list[int]], new: int, store: PrefixStore | None) -> Batch:
    """In a session of their own."""
    began, began_cpu, passes = time.perf_counter(), time.process_time(), model.profile.passes
    with Session(model, prefix_store=store) as session:
        replies = session.generate(prompts, max_new_tokens=new, ignore_eos=True)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    cached = sum(reply.cached_tokens for reply in replies)
    return Batch(seconds, cpu_s, model.profile.passes - passes, cached, [reply.tokens for reply in replies])


def measure(command: list[str], limit_mb: int) -> Found:
    """What the module of peers printed, in a memory group; None if the kernel killed it."""
    with limited_group("rabbit-long-texts", limit_mb * 10**6) as group:
        joined = group.joined([sys.executable, "-W", "ignore", "-m", *command])
        done = subprocess.run(joined, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        if done.returncode and group.oom_kills():
            return None
        if done.returncode:
            raise SystemExit(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found | {"group_bytes": group.peak_bytes()}


if __name__ == "__main__":
    app()
