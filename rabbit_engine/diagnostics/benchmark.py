"""Timed runs as one record type: every condition, every round, interleaved, with the disk's own rate in the same run."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rabbit_engine.model import AutoModel, StreamedModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.plan import Plan
from rabbit_engine.streaming import Span, Trace, busy_share
from rabbit_engine.streaming.transfer.measure import direct_reads
from rabbit_engine.streaming.transfer.unit import Unit
from rabbit_engine.transformers_bridge.forwards import cache_argument, cache_of, last_logits_argument
from rabbit_engine.utils.platform import environment, has_streams
from rabbit_engine.utils.sizes import format_bytes

PROMPT_TOKENS = 16
STEPS = 3
RESIDENT = "transformers, resident (computation alone)"
DISK = "disk alone: direct reads of the same bytes"
RING = "ring alone: the same bytes through the ring, no computation"
DECODE = "decoding"
Lane = Callable[[], None]


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """One lane of a benchmark: seconds and CPU seconds of every round, bytes per round, and the conditions of all rounds."""

    lane: str
    rounds_s: tuple[float, ...]
    bytes_moved: int
    conditions: Mapping[str, Any]
    cpu_s: tuple[float, ...] = ()

    @property
    def median_s(self) -> float:
        """The median round."""
        return statistics.median(self.rounds_s)

    @property
    def spread_s(self) -> float:
        """From the fastest round to the slowest."""
        return max(self.rounds_s) - min(self.rounds_s)

    @property
    def rate(self) -> float:
        """Bytes per second of the median round; 0 if nothing moves."""
        return self.bytes_moved / self.median_s if self.median_s else 0.0

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds of the process per gigabyte moved, in the median round; 0 if nothing moves or was counted."""
        return statistics.median(self.cpu_s) / self.bytes_moved * 1e9 if self.cpu_s and self.bytes_moved else 0.0

    def as_json(self) -> str:
        """All rounds as one line of JSON."""
        return json.dumps({**asdict(self), "median_s": self.median_s})


def make_checkpoint(folder: Path, layers: int, hidden_size: int) -> Path:
    """A Llama with random bf16 weights, saved by transformers; kept if it exists."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=max(1, hidden_size // 512),
        bos_token_id=1,
        eos_token_id=None,
        dtype="bfloat16",
    )
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(folder, max_shard_size="1GB")
        del model
        gc.collect()
    return folder


def evict(folder: Path) -> None:
    """Drop every weight file below `folder` from the page cache, so that a round reads from disk."""
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def interleaved(lanes: Mapping[str, Lane], rounds: int, steps: int, before: Lane) -> dict[str, list[tuple[float, float]]]:
    """Run every lane `steps` times a round; returns `(seconds, CPU seconds)` per step, by lane.

    Each lane is warmed by one step before the clock starts, and its wait at the end is timed, so that it pays for its own
    read-ahead.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in lanes}
    for _ in range(rounds):
        for name, lane in lanes.items():
            before()
            lane()
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                before()
                lane()
            seconds[name].append(((time.perf_counter() - start) / steps, (time.process_time() - cpu) / steps))
    return seconds


def made_up_prompt(model: PreTrainedModel, tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """int64 [1, tokens] on the model's device, or on another: its vocabulary in order, repeated, without the first two."""
    words: int = model.config.get_text_config().vocab_size
    return 2 + torch.arange(tokens, device=device or model.device)[None] % (words - 2)


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    """The cache after a prompt of int64 [1, tokens]; only the last token's logits if the class can do that."""
    with torch.no_grad():
        return cache_of(model(ids, use_cache=True, **last_logits_argument(model.forward)))


def decode_step(model: PreTrainedModel, prompt_tokens: int = PROMPT_TOKENS, device: torch.device | None = None) -> Lane:
    """Decode one token after a prompt that is already in the cache. `device` is where a model computes whose own is another."""
    ids = made_up_prompt(model, prompt_tokens, device)
    cache = prefill(model, ids)
    past = cache_argument(model.forward, cache)
    can_go_back = _can_go_back(cache)

    def step() -> None:
        with torch.no_grad():
            model(ids[:, -1:], use_cache=True, **past)
        if can_go_back:
            cache.crop(-1)
        if has_streams(ids.device):
            torch.accelerator.synchronize(ids.device)

    return step


def _can_go_back(cache: Any) -> bool:
    """Whether the last token can be removed again; not from a state or a full window: then the cache grows each step."""
    try:
        cache.crop(-1)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError):
        return False
    return True


def ring_step(model: StreamedModel) -> Lane:
    """Pass the units of one pass through the ring: acquired and released, without computation."""
    transfer = runtime_of(model).transfer
    names = [unit.name for unit in transfer.units]

    def step() -> None:
        with runtime_of(model).binding.root_pass():
            for name in names:
                transfer.acquire(name)
                transfer.release(name)

    return step


def _settled(model: StreamedModel, lane: Lane) -> Lane:
    """The lane, started once the model reads nothing ahead."""

    def run() -> None:
        runtime_of(model).transfer.wait_until_idle()
        lane()

    return run


def link(name: str | Path, rounds: int = 5, steps: int = STEPS, **keywords: Any) -> tuple[list[BenchmarkRow], list[Span], Plan]:
    """The fraction of the disk's rate that streaming gets, and its CPU cost; the spans of the last round's decoding; the plan.

    Bytes and seconds are for one token, always the same one: its experts stay cached if there is room. The disk lane reads
    the same bytes in the same order, without computation.
    """
    with AutoModel.from_pretrained(name, profiling_mode=True, **keywords) as model:
        transfer, trace = runtime_of(model).transfer, runtime_of(model).trace
        trace.on = False
        chunks = [chunk for unit in (*transfer.units, *_uncached(model)) for chunk in unit.chunks()]
        step = decode_step(model)
        lanes: dict[str, Lane] = {DECODE: step}
        if chunks:
            ring = {} if model.plan.experts.layers else {RING: ring_step(model)}  # experts do not pass through it
            lanes = {DISK: _settled(model, direct_reads(chunks)), **ring, DECODE: step}
        found = interleaved(lanes, rounds, steps, lambda: None)
        with tracing(trace):
            for _ in range(steps):
                step()
        moved = sum(chunk.read_bytes for chunk in chunks)
        conditions = {
            "model": str(name),
            "plan": model.plan.reason,
            "budget": model.plan.budget.weights_bytes,
            **_conditions(steps),
        }
        records = [_record(lane, values, moved, conditions) for lane, values in found.items()]
        return records, trace.spans(), model.plan


def _uncached(model: StreamedModel) -> list[Unit]:
    """The number of experts of each layer that the same token, repeated, reads each time."""
    experts = runtime_of(model).partition.experts
    return [unit for layer in model.plan.experts.layers for unit in experts[layer.name][: layer.uncached]]


@contextmanager
def tracing(trace: Trace) -> Iterator[None]:
    """A block whose spans are recorded, without those of before."""
    trace.clear()
    trace.on = True
    try:
        yield
    finally:
        trace.on = False


def _conditions(steps: int) -> dict[str, object]:
    return {
        "what": f"a decoded token after {PROMPT_TOKENS}, {steps} a round",
        "threads": torch.get_num_threads(),
        **environment(),
    }


def _record(lane: str, values: Sequence[tuple[float, float]], moved: int, conditions: Mapping[str, Any]) -> BenchmarkRow:
    return BenchmarkRow(lane, tuple(wall for wall, _ in values), moved, conditions, tuple(cpu for _, cpu in values))


def residency(name: str | Path, budgets: Sequence[int], steps: int = STEPS, **keywords: Any) -> list[BenchmarkRow]:
    """Bytes read and seconds per token as the budget grows: one record per budget, one token per round."""
    records = []
    for budget in budgets:
        with AutoModel.from_pretrained(name, max_memory={"cpu": budget}, device="cpu", **keywords) as model:
            step = decode_step(model)
            for _ in range(2):  # the first token teaches the order
                step()
            runtime_of(model).transfer.wait_until_idle()
            before = model.profile.bytes_read
            found = interleaved({DECODE: step}, steps, 1, lambda: None)[DECODE]
            runtime_of(model).transfer.wait_until_idle()
            read = (model.profile.bytes_read - before) // (2 * steps)
            conditions = {"budget": budget, "plan_pass_bytes": model.plan.pass_bytes, **_conditions(1)}
            records.append(_record(f"{format_bytes(budget)} for weights", found, read, conditions))
    return records


def offloaded(folder: Path, layers: int, offload_folder: Path) -> PreTrainedModel:
    """transformers' own disk offload: every layer on disk, the rest in memory."""
    device_map: dict[str, str] = {f"model.layers.{i}": "disk" for i in range(layers)}
    device_map |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=offload_folder)
    model.eval()
    return model


def resident(folder: Path) -> PreTrainedModel:
    """The whole model in its own memory: mapped files would keep their pages in the cache for the other lanes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    model.eval()
    return model


def decode_on_cpu(folder: Path, layers: int = 12, hidden_size: int = 2048, rounds: int = 5) -> list[BenchmarkRow]:
    """Seconds per decoded token from a cold page cache, every layer streamed: ours, transformers' disk offload, resident; and
    the disk alone."""
    make_checkpoint(folder, layers, hidden_size)
    head = 2 * 32000 * hidden_size
    budget: dict[int | str, int | str] = {
        "cpu": head + 80 * 2**20
    }  # about what the other one keeps: the head, and room for two matrices
    with (
        AutoModel.from_pretrained(folder, device="cpu", max_memory=budget) as streamed,
        AutoModel.from_pretrained(folder, device="cpu", max_memory=budget, prefetching=False) as unhurried,
    ):
        chunks = [chunk for unit in runtime_of(streamed).transfer.units for chunk in unit.chunks()]
        moved = streamed.plan.pass_bytes
        lanes = {
            DISK: _settled(streamed, direct_reads(chunks)),
            "rabbit_engine": decode_step(streamed),
            "rabbit_engine, prefetching=False": decode_step(unhurried),
            "transformers disk offload": decode_step(offloaded(folder, layers, folder / "offload")),
            RESIDENT: decode_step(resident(folder)),
        }
        found = interleaved(lanes, rounds, STEPS, lambda: evict(folder))
    conditions = {
        "model": f"Llama, {layers} layers, hidden {hidden_size}, bf16, {format_bytes(moved)} streamed a pass",
        "page_cache": "dropped before every token, inside the clock",
        **_conditions(STEPS),
    }
    return [_record(name, values, 0 if name == RESIDENT else moved, conditions) for name, values in found.items()]


def as_markdown(records: Sequence[BenchmarkRow], rounds: str = "interleaved rounds") -> str:
    """A table of medians, with the conditions below."""
    lines = ["| lane | s a token | slowest - fastest | GB a token | GB/s | CPU s a GB |", "|---|---|---|---|---|---|"]
    for record in records:
        moved = f"{record.bytes_moved / 1e9:.2f} | {record.rate / 1e9:.2f} | {record.cpu_s_per_gb:.2f}"
        lines.append(
            f"| {record.lane} | {record.median_s:.3f} | {record.spread_s:.3f} | {moved if record.bytes_moved else '- | - | -'} |"
        )
    conditions = "; ".join(f"{name}: {value}" for name, value in records[0].conditions.items())
    return "\n".join([*lines, "", f"Medians of {len(records[0].rounds_s)} {rounds}. {conditions}."])


def shares(spans: Sequence[Span]) -> dict[str, float]:
    """The fraction of a trace in which each lane was busy; "draft" only if there are drafts."""
    drafts = {"draft"} & {span.lane for span in spans}
    return {lane: busy_share(spans, lane) for lane in ("disk", "copy", "compute", "wait", *drafts)}
