"""Texts a second: classified and embedded by a streamed model and by transformers, by texts a pass, and chats of `rabbit batch`.

    python scripts/benchmark_tasks.py texts MODEL [--count 1000] [--rounds 3]
    python scripts/benchmark_tasks.py passes MODEL [--sizes 1,4,16,64,256]
    python scripts/benchmark_tasks.py chats MODEL [--count 200] [--alone 20] [--tokens 16]

Weights have a quarter of what they take (`--share`). Every lane of every round is a process of its own; `--within` is a command
to run them by. Texts are sentences of docs/. A run in which other processes took a tenth of a core or more is
repeated once.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SCRIPTS = Path(__file__).resolve().parent
LANES = (
    "streamed, exact",
    "streamed, exact=False",
    "resident, one by one",
    "resident, batches",
    "offload, one by one",
    "offload, batches",
)
REFERENCE = "resident, one by one"
_DISTURBED = 0.1

Runs = dict[tuple[str, str], list[dict[str, Any]]]
"""The runs of each lane by task and name."""

app = typer.Typer(add_completion=False)
Model = Annotated[Path, typer.Argument(exists=True, file_okay=False, resolve_path=True)]
Within = Annotated[str, typer.Option(help="A command that runs each lane, such as one that lets other work wait.")]
Share = Annotated[float, typer.Option(help="The fraction of the weights' bytes that streamed and offloaded models get.")]
Dtype = Annotated[str, typer.Option(help="The dtype of the weights; as in the checkpoint by default.")]


@dataclass(slots=True)
class Bench:
    """A prepared checkpoint with its texts, and how its lanes run."""

    folder: Path
    source: Path
    scratch: Path
    memory: int
    within: Sequence[str]
    tries: int = 2
    tokens: list[int] = field(default_factory=list)

    def run(self, module: str, *arguments: object) -> dict[str, Any]:
        """The record of one process; one that was disturbed is repeated."""
        command = [*self.within, sys.executable, "-m", f"peers.{module}", *map(str, arguments), "--memory", str(self.memory)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        found: list[dict[str, Any]] = []
        for _ in range(self.tries):
            done = subprocess.run(command, cwd=SCRIPTS, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}", file=sys.stderr, flush=True)
                continue
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{found[-1]}: others took {disturbance(found[-1]):.2f} of a core", file=sys.stderr, flush=True)
            if disturbance(found[-1]) <= _DISTURBED:
                break
        if not found:
            raise SystemExit(f"{shlex.join(command)} failed {self.tries} times")
        return min(found, key=disturbance)

    def lane(self, name: str, count: int, task: str, batch: int = 32) -> dict[str, Any]:
        """A run of a lane, with its results."""
        results = self.scratch / "results.pt"
        options = ("--count", count, "--batch", batch, "--results", results, "--task", task)
        record = self.run("tasks", name, self.folder, self.scratch / "texts.json", *options)
        return {**record, "results": torch.load(results)}


def disturbance(record: dict[str, Any]) -> float:
    """The most that other processes took of a core while something was timed."""
    timed = [part for part in record.values() if isinstance(part, dict) and "others_s" in part]
    return max((part["others_s"] / part["s"] for part in timed), default=0.0)


def sentences(folder: Path, count: int) -> list[str]:
    """Prose of Markdown files, 8 to 80 words a text, few of them long; the same in every run."""
    lines = [line for path in sorted(folder.glob("*.md")) for line in path.read_text(encoding="utf-8").splitlines()]
    prose = " ".join(line.lstrip("- ") for line in lines if len(line) > 40 and re.match(r"[A-Z-]", line))
    words, draw = prose.split(), random.Random(0)
    starts = [index + 1 for index, word in enumerate(words[:-80]) if word.endswith((".", ":"))]
    lengths = [8 + int(72 * draw.random() ** 3) for _ in range(count)]
    return [" ".join(words[start : start + length]) for start, length in zip(draw.choices(starts, k=count), lengths, strict=True)]


@contextmanager
def prepared(model: Path, count: int, share: float, within: str, dtype: str) -> Iterator[Bench]:
    """The model with a head of four labels, seeded, saved once for all lanes; and the texts."""
    with tempfile.TemporaryDirectory(dir=model.parent) as name:
        scratch = Path(name)
        folder = scratch / model.name
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype, num_labels=4)
        if loaded.config.pad_token_id is None:
            loaded.config.pad_token_id = tokenizer.eos_token_id
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        memory = int(share * sum(weight.nbytes for weight in loaded.parameters()))
        texts = sentences(SCRIPTS.parent / "docs", count)
        (scratch / "texts.json").write_text(json.dumps(texts))
        yield Bench(folder, model, scratch, memory, shlex.split(within), tokens=[len(ids) for ids in tokenizer(texts).input_ids])


def difference(found: torch.Tensor, reference: torch.Tensor) -> str:
    """How far the results are from those of the reference, of as many texts."""
    reference = reference[: len(found)]
    return "yes" if torch.equal(found, reference) else f"within {(found - reference).abs().max():.1e}"


def median(records: Sequence[dict[str, Any]], task: str, figure: str = "s") -> float:
    """The median of a task's figure."""
    return float(statistics.median(record[task][figure] for record in records))


def rows(bench: Bench, runs: Runs) -> Iterator[str]:
    """A line for each task of each lane."""
    for (task, lane), records in runs.items():
        count, seconds = records[0]["texts"], median(records, task)
        reference = runs[task, REFERENCE][0]["results"][task]
        cells = (
            task,
            lane,
            f"{count:,}",
            ", ".join(f"{record[task]['s']:.1f}" for record in records),
            f"{count / seconds:.1f}",
            f"{sum(bench.tokens[:count]) / seconds:,.0f}",
            f"{median(records, task, 'read_bytes') / 1e9:.2f}",
            f"{statistics.median(record['peak_rss_bytes'] for record in records) / 1e6:,.0f}",
            ", ".join(sorted({difference(record["results"][task], reference) for record in records})),
        )
        yield f"| {' | '.join(cells)} |"


def tell(bench: Bench, records: Sequence[dict[str, Any]]) -> None:
    """The conditions."""
    rates = [record["disk_rate"] for record in records if "disk_rate" in record]
    most = max(map(disturbance, records))
    disk = f"; the disk gave {statistics.median(rates) / 1e9:.2f} GB/s" if rates else ""
    counts, mean = bench.tokens, statistics.fmean(bench.tokens)
    print(f"\n{bench.source.name}: {bench.memory / 1e6:.1f} MB for weights, or the least that works{disk}")
    print(f"{len(counts)} texts of {min(counts)} to {max(counts)} tokens, {mean:.0f} on average")
    print(f"other processes took up to {most:.2f} of a core")


@app.command()
def texts(
    model: Model,
    count: int = 1000,
    rounds: int = 3,
    batch: int = 32,
    offloaded: Annotated[str, typer.Option(help="Texts of the slow lanes: offload one by one, offload in batches.")] = "20,128",
    tasks: str = "classify,embed",
    share: Share = 0.25,
    within: Within = "",
    dtype: Dtype = "auto",
) -> None:
    """Classify and embed, in all lanes."""
    slow = dict(zip(LANES[-2:], map(int, offloaded.split(",")), strict=True))
    with prepared(model, count, share, within, dtype) as bench:
        runs: Runs = {(task, lane): [] for task in tasks.split(",") for lane in LANES}
        for _ in range(rounds):
            for (task, lane), found in runs.items():
                found.append(bench.lane(lane, min(count, slow.get(lane, count)), task, batch))
        print("| task | lane | texts | s, every round | texts/s | tokens/s | read, GB | peak RSS, MB | results equal |")
        print("|---|---|---|---|---|---|---|---|---|", *rows(bench, runs), sep="\n")
        tell(bench, [record for found in runs.values() for record in found])


@app.command()
def passes(
    model: Model,
    sizes: str = "1,4,16,64,256",
    rounds: int = 3,
    share: Share = 0.25,
    within: Within = "",
    dtype: Dtype = "auto",
) -> None:
    """Texts a second by the texts of a pass."""
    counts = [int(part) for part in sizes.split(",")]
    with prepared(model, max(counts), share, within, dtype) as bench:
        runs: dict[tuple[int, str], list[dict[str, Any]]] = {(count, lane): [] for count in counts for lane in LANES[:2]}
        for _ in range(rounds):
            for (count, lane), found in runs.items():
                found.append(bench.lane(lane, count, "classify"))
        print("| texts a pass | lane | s a pass | texts/s | the disk alone, s |\n|---|---|---|---|---|")
        for (count, lane), records in runs.items():
            seconds, rate = median(records, "classify"), statistics.median(record["disk_rate"] for record in records)
            reading = median(records, "classify", "read_bytes") / rate
            print(f"| {count} | {lane} | {seconds:.2f} | {count / seconds:.1f} | {reading:.2f} |")
        tell(bench, [record for found in runs.values() for record in found])


@app.command()
def chats(
    model: Model,
    count: int = 200,
    alone: int = 20,
    tokens: int = 16,
    rounds: int = 1,
    share: Share = 0.25,
    within: Within = "",
    dtype: Dtype = "auto",
) -> None:
    """`rabbit batch` of chats against some of them one after another."""
    alone = min(alone, count)
    with prepared(model, count, share, within, dtype) as bench:
        given = ("--count", count, "--alone", alone, "--tokens", tokens)
        records = [bench.run("chats", model, bench.scratch / "texts.json", *given) for _ in range(rounds)]
        print("| lane | chats | s, every round | chats/s | read, GB | equal |\n|---|---|---|---|---|---|")
        for lane, number in (("batch", count), ("generate", alone)):
            every = ", ".join(f"{record[lane]['s']:.1f}" for record in records)
            rate, read = number / median(records, lane), median(records, lane, "read_bytes") / 1e9
            equal = f"{min(record['equal'] for record in records)} of {alone}" if lane == "batch" else ""
            print(f"| {lane} | {number} | {every} | {rate:.2f} | {read:.2f} | {equal} |")
        print(f"\n{records[0]['budget_bytes'] / 1e6:.0f} MB for weights; peak RSS {records[0]['peak_rss_bytes'] / 1e6:.0f} MB")
        tell(bench, records)


if __name__ == "__main__":
    app()
