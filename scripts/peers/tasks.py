"""One lane of benchmark_tasks in a process of its own: `python -m peers.tasks LANE FOLDER TEXTS --task embed ...`.

It classifies or embeds the texts, saves the logits or vectors, and prints what it took as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rabbit_engine
from peers.timing import peak_rss_bytes, read_bytes
from rabbit_engine import Session
from rabbit_engine.errors import BudgetError
from rabbit_engine.streaming.transfer.disk_rate import measure_disk_rate

_SAMPLE_BYTES = 2**28

T = TypeVar("T")
Texts = Sequence[str]
Task = Callable[[Texts], torch.Tensor]
"""float32 [texts, labels or width]."""


def load_streamed(auto: Any, folder: Path, memory: int) -> Any:
    """The model in `memory`, or in the least that works; its `plan.budget` says which."""
    try:
        return auto.from_pretrained(folder, device="cpu", max_memory={"cpu": memory})
    except BudgetError as error:
        if error.smallest_bytes is None:
            raise
        return auto.from_pretrained(folder, device="cpu", max_memory={"cpu": error.smallest_bytes})


@contextmanager
def streamed(folder: Path, memory: int, *, exact: bool) -> Iterator[dict[str, Task]]:
    """A session of a model with `memory` for its weights."""
    loaded = load_streamed(rabbit_engine.AutoModelForSequenceClassification, folder, memory)
    with loaded as model, Session(model, exact=exact) as session:

        def classify(texts: Texts) -> torch.Tensor:
            found = session.classify(texts, activation="none")
            scores = [{each.label: each.score for each in one.scores} for one in found]
            return torch.tensor([[one[name] for name in model.config.id2label.values()] for one in scores])

        yield {"classify": classify, "embed": lambda texts: session.embed(texts, pooling="mean", normalize=False)}


@contextmanager
def whole(folder: Path, memory: int | None, *, batch: int) -> Iterator[dict[str, Task]]:
    """transformers, with `memory` for weights and the rest offloaded to disk; texts of about one length in padded batches."""
    with tempfile.TemporaryDirectory() as offload:
        given: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": memory}, "offload_folder": offload} if memory else {}
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", **given).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

        def run(texts: Texts, compute: Callable[[Any], torch.Tensor]) -> torch.Tensor:
            lengths = [len(ids) for ids in tokenizer(list(texts)).input_ids]
            order = sorted(range(len(texts)), key=lambda index: -lengths[index]) if batch > 1 else list(range(len(texts)))
            found: dict[int, torch.Tensor] = {}
            for start in range(0, len(order), batch):
                some = order[start : start + batch]
                inputs = tokenizer([texts[index] for index in some], padding=len(some) > 1, return_tensors="pt")
                found.update(zip(some, compute(inputs), strict=True))
            return torch.stack([found[index] for index in range(len(texts))])

        def mean(inputs: Any) -> torch.Tensor:
            states, mask = model.base_model(**inputs).last_hidden_state.float(), inputs["attention_mask"].float()
            vectors: torch.Tensor = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            return vectors

        yield {
            "classify": lambda texts: run(texts, lambda inputs: model(**inputs).logits.float()),
            "embed": lambda texts: run(texts, mean),
        }


def opened(lane: str, folder: Path, memory: int, batch: int) -> Any:
    """The tasks of a lane, as a context. Raises SystemExit for an unknown one."""
    lanes = {
        "streamed, exact": lambda: streamed(folder, memory, exact=True),
        "streamed, exact=False": lambda: streamed(folder, memory, exact=False),
        "resident, one by one": lambda: whole(folder, None, batch=1),
        "resident, batches": lambda: whole(folder, None, batch=batch),
        "offload, one by one": lambda: whole(folder, memory, batch=1),
        "offload, batches": lambda: whole(folder, memory, batch=batch),
    }
    if lane not in lanes:
        raise SystemExit(f"{lane!r} is not a lane: expected one of {', '.join(lanes)}")
    return lanes[lane]()


def busy_s() -> float:
    """Seconds that the processors have worked for all processes since the system started; 0 where it does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = [int(part) for part in stat.read_text().splitlines()[0].split()[1:]]
    return (sum(ticks[:8]) - ticks[3] - ticks[4]) / 100


def timed(task: Callable[[Texts], T], texts: Texts) -> tuple[T, dict[str, float]]:
    """Its results; seconds, bytes read, and the processor seconds that others took meanwhile."""
    start, own, busy, read = time.perf_counter(), time.process_time(), busy_s(), read_bytes()
    with torch.no_grad():
        found = task(texts)
    seconds, own = time.perf_counter() - start, time.process_time() - own
    return found, {"s": seconds, "read_bytes": read_bytes() - read, "others_s": max(0.0, busy_s() - busy - own)}


def main() -> None:
    """Load, run the task on all texts, print the record."""
    arguments = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("lane", str), ("folder", Path), ("texts", Path)):
        arguments.add_argument(name, type=kind)
    for name in ("--count", "--memory", "--batch"):
        arguments.add_argument(name, type=int, required=True)
    arguments.add_argument("--results", type=Path, required=True)
    arguments.add_argument("--task", required=True, choices=("classify", "embed"))
    options = arguments.parse_args()
    texts = json.loads(options.texts.read_text())[: options.count]
    start = time.perf_counter()
    with opened(options.lane, options.folder, options.memory, options.batch) as tasks:
        record: dict[str, Any] = {"lane": options.lane, "texts": len(texts), "load_s": time.perf_counter() - start}
        task = tasks[options.task]
        timed(task, texts[:1])  # compiles, and takes the first pass's extra reads
        found, record[options.task] = timed(task, texts)
        record["peak_rss_bytes"] = peak_rss_bytes()
    if "streamed" in options.lane:
        record["disk_rate"] = measure_disk_rate(options.folder, _SAMPLE_BYTES, 3).median
    torch.save({options.task: found}, options.results)
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
