"""Timed runs into one record type: every condition, every round, interleaved, beside the disk's own rate in the same run."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rabbit_engine.model import AutoModel
from rabbit_engine.units import format_bytes
from rabbit_engine.utils.platform import environment

PROMPT_TOKENS = 16
STEPS = 4
RESIDENT = "transformers, resident (the compute alone)"
Lane = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Record:
    """One lane of a benchmark: seconds of every round, the bytes a round moves, and what all rounds had in common."""

    lane: str
    rounds_s: tuple[float, ...]
    bytes_moved: int
    conditions: Mapping[str, Any]

    @property
    def median_s(self) -> float:
        """The middle round."""
        return statistics.median(self.rounds_s)

    @property
    def spread_s(self) -> float:
        """From the fastest round to the slowest."""
        return max(self.rounds_s) - min(self.rounds_s)

    def as_json(self) -> str:
        """One line, every round in it."""
        return json.dumps({**asdict(self), "median_s": self.median_s})


def make_checkpoint(folder: Path, layers: int, hidden_size: int) -> Path:
    """A Llama of random bf16 weights, made a layer's worth of memory at a time by transformers; kept if it is there."""
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
    """Drop the page cache of every file below `folder`: a round begins with the weights on disk."""
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def interleaved(lanes: Mapping[str, Lane], rounds: int, steps: int, before: Lane) -> dict[str, tuple[float, ...]]:
    """Run every lane `steps` times a round, `before` each; seconds a step by lane.

    `before` is inside the clock: outside, a lane that reads ahead would read for nothing.
    """
    seconds: dict[str, list[float]] = {name: [] for name in lanes}
    for _ in range(rounds):
        for name, lane in lanes.items():
            start = time.perf_counter()
            for _ in range(steps):
                before()
                lane()
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: tuple(found) for name, found in seconds.items()}


def read_files(paths: Sequence[Path], buffer: memoryview) -> None:
    """Read files one after another into a reused buffer: what this disk gives a plain reader."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def decode_step(model: Any) -> Lane:
    """One decoded token behind a prompt that is in the cache already."""
    ids = torch.arange(2, 2 + PROMPT_TOKENS, device=model.device)[None]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values

    def step() -> None:
        with torch.no_grad():
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def offloaded(folder: Path, layers: int, offload_folder: Path) -> Any:
    """transformers' own disk offload: every layer on disk, the rest in memory."""
    device_map: dict[str, Any] = {f"model.layers.{i}": "disk" for i in range(layers)}
    device_map |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=offload_folder).eval()


def resident(folder: Path) -> Any:
    """The whole model in memory of its own: a map of its files would keep their pages in the cache for the other lanes."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def decode_on_cpu(folder: Path, layers: int = 12, hidden_size: int = 2048, rounds: int = 5) -> list[Record]:
    """Seconds a decoded token from a cold page cache: streamed, transformers' disk offload, resident; and the disk alone."""
    make_checkpoint(folder, layers, hidden_size)
    with (
        AutoModel.from_pretrained(folder, device="cpu") as streamed,
        AutoModel.from_pretrained(folder, device="cpu", prefetching=False) as unhurried,
    ):
        shards = sorted(streamed._prepared.folder.glob("model.layers.*.safetensors"))
        moved = sum(path.stat().st_size for path in shards)
        buffer = memoryview(bytearray(streamed.plan.slot_bytes))
        lanes = {
            "disk alone: plain reads of the same shards": lambda: read_files(shards, buffer),
            "rabbit_engine": decode_step(streamed),
            "rabbit_engine, prefetching=False": decode_step(unhurried),
            "transformers disk offload": decode_step(offloaded(folder, layers, folder / "offload")),
            RESIDENT: decode_step(resident(folder)),
        }
        seconds = interleaved(lanes, rounds, STEPS, lambda: evict(folder))
    conditions = {
        "model": f"Llama, {layers} layers, hidden {hidden_size}, bf16, {format_bytes(moved)} in layers",
        "what": f"a decoded token behind {PROMPT_TOKENS}, {STEPS} a round",
        "page_cache": "dropped before every token, inside the clock",
        "threads": torch.get_num_threads(),
        **environment(),
    }
    return [Record(name, found, 0 if name == RESIDENT else moved, conditions) for name, found in seconds.items()]


def as_markdown(records: Sequence[Record]) -> str:
    """A table of medians, with the conditions under it."""
    lines = ["| lane | s a token | slowest - fastest | GB/s |", "|---|---|---|---|"]
    for record in records:
        rate = f"{record.bytes_moved / record.median_s / 1e9:.2f}" if record.bytes_moved else "-"
        lines.append(f"| {record.lane} | {record.median_s:.3f} | {record.spread_s:.3f} | {rate} |")
    conditions = "; ".join(f"{name}: {value}" for name, value in records[0].conditions.items())
    return "\n".join([*lines, "", f"Medians of {len(records[0].rounds_s)} interleaved rounds. {conditions}."])
