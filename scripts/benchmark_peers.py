"""Seconds per decoded token of rabbit_engine and its peers, each in a memory group smaller than the model, cold page cache.

    python scripts/benchmark_peers.py --model DIR --memory 3GB --rabbit-python PYTHON [--gguf FILE --llama-python PYTHON] ...

Needs root and Linux (cgroup v1 or v2), and next to the model room for one copy of it per peer that splits. A peer's Python is
that of a virtual environment with the peer; peers without one are skipped. The last lines are the records as JSON.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import psutil
import typer
from peers.lanes import Lane, Limits, Run, best_settings, prepare_lane, run_lane
from peers.memory_group import ReadLimit, find_controller
from peers.report import as_markdown
from peers.timing import PROMPT_IDS

_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIXTHS = range(1, 6)


def parse_bytes(text: str) -> int:
    """`parse_bytes("1.5GB") -> 1500000000`. Raises BadParameter for an invalid size."""
    match = re.fullmatch(r"([\d.]+) ?([kKMG]?i?B|)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f'{text!r} is not a size; write "3GB", "3GiB" or bytes')
    return int(float(match[1]) * _UNITS[match[2]])


def budgets_of(memory_bytes: int, budgets: str | None) -> list[int]:
    """Sizes to try for weights in memory: those given, else the sixths of the whole."""
    if budgets == "none":
        return []
    if budgets:
        return [parse_bytes(part) for part in budgets.split(",")]
    return [memory_bytes * part // 6 for part in _SIXTHS]


def rabbit_lanes(
    python: str | None, model: Path, budgets: Sequence[int], compressions: Sequence[str], ggufs: Sequence[Path], shards: Path
) -> Iterator[Lane]:
    """rabbit_engine with its own budget: the model's files, compressed, and GGUF files in place."""
    if python is None:
        return
    yield Lane(name="rabbit_engine", module="rabbit", python=python, model=model)
    for compression in compressions:
        always = ("--compression", compression, "--shards", str(shards / "rabbit_engine"))
        yield Lane(name=f"rabbit_engine {compression}", module="rabbit", python=python, model=model, always=always, prepares=True)
    for gguf in ggufs:
        lane = partial(Lane, module="rabbit", python=python, model=gguf)
        yield lane(name=f"rabbit_engine, {gguf.name} in place")
        yield lane(name=f"rabbit_engine, {gguf.name} in place, fused", always=("--fused-products",))
    if compressions:
        yield Lane(name="transformers with bitsandbytes nf4", module="transformers_bnb", python=python, model=model)
    if not budgets:
        return
    yield Lane(
        name="transformers disk offload",
        module="transformers_offload",
        python=python,
        model=model,
        settings=tuple(("--resident-bytes", str(size)) for size in budgets),
    )


def speculation_lanes(python: str | None, model: Path, drafts: Sequence[str], resident: int) -> Iterator[Lane]:
    """rabbit_engine and transformers' offload, each with these drafts: "lookup", "4bit" (of the model itself), or folders."""
    for draft in drafts if python else ():
        name = Path(draft).name
        always = ("--draft", draft)
        lane = partial(Lane, python=str(python), model=model)
        yield lane(name=f"rabbit_engine, draft {name}", module="rabbit", always=always, prepares=draft == "4bit")
        if draft != "4bit":
            assisted = ("--assistant", draft, "--resident-bytes", str(resident))
            yield lane(name=f"transformers disk offload, assistant {name}", module="transformers_offload", always=assisted)


def disk_lane(python: str | None, model: Path) -> Iterator[Lane]:
    """The rate of a slowed disk, measured in the same rounds."""
    if python:
        yield Lane(name="the disk alone, a gigabyte in place of a token", module="disk", python=python, model=model)


def airllm_lanes(python: str | None, model: Path, compressions: Sequence[str], shards: Path) -> Iterator[Lane]:
    """AirLLM with its defaults, and in four bits if that is among the compressions."""
    if python is None:
        return
    lane = partial(Lane, module="airllm_4", python=python, model=model, prepares=True)
    always = ("--shards", str(shards / "airllm"))
    yield lane(name="AirLLM", always=always)
    if "4bit" in compressions:
        yield lane(name="AirLLM 4bit", always=(*always, "--compression", "4bit"))


def rabbitllm_lane(python: str | None, model: Path, shards: Path) -> Iterator[Lane]:
    """RabbitLLM with its defaults, and with the settings that a plain Llama needs."""
    if python:
        yield Lane(
            name="RabbitLLM",
            module="rabbitllm_1",
            python=python,
            model=model,
            always=("--shards", str(shards / "rabbitllm")),
            settings=((), ("--supply-rotary",)),
            prepares=True,
        )


def llama_lanes(python: str | None, ggufs: Sequence[Path]) -> Iterator[Lane]:
    """llama.cpp with each file mapped: by default it copies quantised weights in another layout; and without that."""
    for gguf in ggufs if python else ():
        yield Lane(name=f"llama.cpp, {gguf.name}", module="llama_cpp", python=str(python), model=gguf)
        yield Lane(
            name=f"llama.cpp, {gguf.name}, not repacked",
            module="llama_cpp",
            python=str(python),
            model=gguf,
            always=("--no-repack",),
        )


def say(text: str) -> None:
    """Print progress, separately from the result."""
    print(text, file=sys.stderr, flush=True)


def noted(run: Run) -> Run:
    """Run, and print the outcome."""
    say(f"{run.phase}: {' '.join((run.lane, *run.settings))}: {run.outcome} {run.error or ''} in {run.wall_s:.0f} s")
    return run


def settle(lane: Lane, arguments: Sequence[str], limits: Limits) -> tuple[list[Run], tuple[str, ...] | None]:
    """Prepare the lane and try its settings: all runs it took, and the settings to use (None: none survived)."""
    runs = [noted(prepare_lane(lane, 10 * limits.timeout_s))] if lane.prepares else []
    if runs and runs[0].outcome != "ok":
        return runs, None
    if len(lane.settings) == 1:
        return runs, lane.settings[0]
    trials = [noted(run_lane(lane, settings, "trial", arguments, limits)) for settings in lane.settings]
    return runs + trials, best_settings(trials)


def measure(lanes: Sequence[Lane], rounds: int, arguments: Sequence[str], limits: Limits) -> list[Run]:
    """Prepare every lane; then run rounds of all lanes, one after another. Who does not survive the first is left out."""
    settled = {lane.name: settle(lane, arguments, limits) for lane in lanes}
    runs = list(chain.from_iterable(found for found, _ in settled.values()))
    running = [(lane, settings) for lane in lanes if (settings := settled[lane.name][1]) is not None]
    for number in range(1, rounds + 1):
        found = [noted(run_lane(lane, settings, f"round {number}", arguments, limits)) for lane, settings in running]
        runs += found
        if number == 1:
            running = [one for one, run in zip(running, found, strict=True) if run.outcome == "ok"]
    return runs


def conditions(limits: Limits, tokens: int, rounds: int, prompt_tokens: int) -> str:
    """The conditions of all rounds."""
    return (
        f"Medians of {rounds} interleaved rounds, {tokens} tokens behind the first each, after a prompt of {prompt_tokens}. "
        f"Every run is a fresh process limited to {limits.memory_bytes / 1e9:.2f} GB by {find_controller().version}, "
        "page cache counted and cold at the start (below a virtual disk the host's own cache may be warm). "
        f"{f'Its reads are limited to {limits.read.rate / 1e6:.0f} MB/s. ' if limits.read else ''}"
        f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU used."
    )


def versions(runs: Sequence[Run]) -> str:
    """The versions of the lanes that reported one."""
    found = {run.lane: run.figures["version"] for run in runs if run.figures.get("version")}
    return "Versions: " + "; ".join(f"{lane} {version}" for lane, version in found.items()) + "."


def left_out(pythons: dict[str, str | None], ggufs: Sequence[Path]) -> str:
    """Which peers were not measured, and why."""
    missing = [f"{name} (no Python given)" for name, python in pythons.items() if python is None]
    if pythons["llama.cpp"] and not ggufs:
        missing.append("llama.cpp (no --gguf given)")
    return f"Left out: {', '.join(missing)}." if missing else "No peer was left out."


def find_python(name: str) -> str:
    """Its absolute path, links kept: a virtual environment is found by its link. Raises BadParameter if it does not exist."""
    found = shutil.which(name)
    if found is None:
        raise typer.BadParameter(f"{name!r} is not a program that can be run")
    return str(Path(found).absolute())


Python = Annotated[
    str | None,
    typer.Option(parser=find_python, metavar="PYTHON", help="The Python of a virtual environment that holds this peer."),
]


def main(
    model: Annotated[Path, typer.Option(help="A Llama's folder, in safetensors.", exists=True, file_okay=False)],
    memory: Annotated[str, typer.Option(help="The memory of each lane, page cache included.")] = "3GB",
    gguf: Annotated[
        list[Path] | None, typer.Option(help="The same model for llama.cpp; peers/write_gguf.py makes it. May be repeated.")
    ] = None,
    compressions: Annotated[str, typer.Option(help="Lanes of rabbit_engine, as 4bit,8bit,lossless; 4bit also of AirLLM.")] = "",
    drafts: Annotated[str, typer.Option(help='Lanes that speculate, as lookup,4bit,DIR: "4bit" is a copy of the model.')] = "",
    resident: Annotated[str, typer.Option(help="transformers' max_memory in lanes that speculate.")] = "1GB",
    only: Annotated[str, typer.Option(help="Run only the lanes whose name matches this pattern.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded and timed after the first one.")] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    budgets: Annotated[
        str | None,
        typer.Option(help="Sizes to try for transformers' max_memory, as 1GB,2GB, or none; the sixths of --memory by default."),
    ] = None,
    prompt_ids: Annotated[str, typer.Option(help="The prompt's token ids.")] = ",".join(map(str, PROMPT_IDS)),
    shards: Annotated[Path | None, typer.Option(help="Where peers write their splits; next to the model by default.")] = None,
    read_rate: Annotated[str, typer.Option(help="Slow the model's disk down to this many bytes a second, as 500MB.")] = "",
    timeout_s: Annotated[float, typer.Option(help="The time limit of a run.")] = 900.0,
    rabbit_python: Python = None,
    airllm_python: Python = None,
    rabbitllm_python: Python = None,
    llama_python: Python = None,
) -> None:
    """Measure every peer whose Python is given; print tables and records."""
    model = model.resolve()
    shards = (shards or model.with_name(f"{model.name}-shards")).resolve()
    limit = parse_bytes(memory)
    ggufs = [path.resolve() for path in gguf or ()]
    slowed = ReadLimit(model, parse_bytes(read_rate)) if read_rate else None
    limits = Limits(memory_bytes=limit, timeout_s=timeout_s, cold=(model, shards, *ggufs), read=slowed)
    pythons = {"rabbit_engine": rabbit_python, "AirLLM": airllm_python, "RabbitLLM": rabbitllm_python, "llama.cpp": llama_python}
    compressed = [part for part in compressions.split(",") if part]
    lanes = [
        *rabbit_lanes(rabbit_python, model, budgets_of(limit, budgets), compressed, ggufs, shards),
        *speculation_lanes(rabbit_python, model, [part for part in drafts.split(",") if part], parse_bytes(resident)),
        *(disk_lane(rabbit_python, model) if read_rate else ()),
        *airllm_lanes(airllm_python, model, compressed, shards),
        *rabbitllm_lane(rabbitllm_python, model, shards),
        *llama_lanes(llama_python, ggufs),
    ]
    lanes = [lane for lane in lanes if re.search(only, lane.name)]
    missing = left_out(pythons, ggufs)
    say(missing)
    runs = measure(lanes, rounds, ("--tokens", str(tokens), "--prompt-ids", prompt_ids), limits)
    print(as_markdown([lane.name for lane in lanes], runs))
    print("", conditions(limits, tokens, rounds, len(prompt_ids.split(","))), versions(runs), missing, "", sep="\n")
    for run in runs:
        print(run.as_json())


if __name__ == "__main__":
    typer.run(main)
