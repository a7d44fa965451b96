"""On an NVIDIA GPU: layers of a 70B in 8, 4 and 2 GiB of device memory, compared with a pinned copy and the resident model.

    python scripts/benchmark_cuda.py [--folder DIR] [--layers N] [--caps 8,4,2] [--rounds N] [--seconds S]
        [--compressions 4bit,8bit] [--peers]

Makes a random Llama with the shape of a 70B (1.7 GB a layer in bf16), with as many layers as DIR has room for. For each cap
and each source of the weights (host memory, disk) it prints seconds per pass, the rate relative to a pinned copy and to the
same reads alone, planned and peak device memory, and whether logits equal the resident model's. With --compressions also those
of compressed shards from host memory; with --peers those of transformers' offload by accelerate, and of AirLLM if it is
installed. A record is printed as JSON as soon as it is measured; the last lines are the table.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers.on_cuda import airllm, has_airllm, offloaded, offloaded_bytes
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rabbit_engine import AutoModel
from rabbit_engine.architectures import build_skeleton
from rabbit_engine.checkpoints import prepare as prepare_shards
from rabbit_engine.config import CompressionConfig, SourceConfig, SplitConfig
from rabbit_engine.diagnostics.benchmark import BenchmarkRow, decode_step, evict
from rabbit_engine.errors import RabbitError
from rabbit_engine.model import StreamedModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.streaming.transfer.measure import direct_reads, measure_link
from rabbit_engine.utils.platform import environment
from rabbit_engine.utils.sizes import format_bytes, format_rate

DEVICE = torch.device("cuda", 0)
LAYER_BYTES = 1_711_308_800
WORKSPACE_BYTES = 384 * 2**20
"""The part of a cap that is not for weights: cuBLAS, logits, the caching allocator's rounding."""

SMALL_HOST_BYTES = 2**30
"""Host memory for weights that come from disk."""

TOKENS = 256
IDS = torch.arange(2, 34)[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One way to run the model: `load` it within `cap` bytes of device memory, do `before` each pass, and `describe` it by
    the bytes that a pass moves to the device (`link_bytes`) and other conditions."""

    name: str
    load: Callable[[], AbstractContextManager[Any]]
    cap: int | None = None
    before: Callable[[], None] = lambda: None
    describe: Callable[[Any], Mapping[str, Any]] = field(default=lambda _: {})


def shape_of_70b(layers: int) -> LlamaConfig:
    """Llama 3.1 70B except for its depth."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=None,
        dtype="bfloat16",
    )


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Write random weights, one layer at a time, in transformers' own format; kept if they exist."""
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = shape_of_70b(layers)
    skeleton = build_skeleton(LlamaForCausalLM, config, torch.bfloat16)
    generator = torch.Generator(DEVICE).manual_seed(0)
    parts: dict[str, list[str]] = {}
    for name in skeleton.state_dict():
        parts.setdefault(".".join(name.split(".")[:3]), []).append(name)
    weight_map: dict[str, str] = {}
    for index, names in enumerate(parts.values(), 1):
        file = f"model-{index:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name in names:
            size = skeleton.state_dict()[name].shape
            tensors[name] = (torch.randn(size, generator=generator, device=DEVICE) * 0.02).bfloat16().cpu()
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@contextmanager
def resident(folder: Path) -> Iterator[PreTrainedModel]:
    """The whole model on the device."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, device_map={"": 0})
    yield model.eval()


def rabbit_lane(folder: Path, cap: int, host_bytes: int, **compressed: Any) -> Lane:
    """rabbit_engine: from host memory if that holds the model, else from disk. `compressed` are the keywords for shards."""
    max_memory: dict[int | str, int | str] = {0: cap - WORKSPACE_BYTES, "cpu": host_bytes}
    kind = f"{compressed['compression']}, " if compressed else ""
    return Lane(
        name=f"{cap / 2**30:g} GiB, {kind}from {source(host_bytes)}",
        cap=cap,
        load=partial(AutoModel.from_pretrained, folder, device=DEVICE, max_memory=max_memory, max_seq_len=TOKENS, **compressed),
        describe=described,
    )


def compressed_lanes(folder: Path, shards: Path, caps: list[int], host_bytes: int, compressions: list[str]) -> list[Lane]:
    """Each compression from host memory. Their logits differ from the resident model's by what it rounds."""
    return [
        rabbit_lane(folder, cap, host_bytes, compression=compression, layer_shards_saving_path=shards)
        for compression in compressions
        for cap in caps
    ]


def make_shards(folder: Path, shards: Path, compressions: list[str]) -> None:
    """Compress the model for the device, unless that is done."""
    for compression in compressions:
        made = CompressionConfig(method=compression, device_type=DEVICE.type)
        prepare_shards(folder, SourceConfig(), SplitConfig(dtype=torch.bfloat16, saving_path=shards, compression=made))


def source(host_bytes: int) -> str:
    """Where weights come from in that much host memory."""
    return "disk" if host_bytes == SMALL_HOST_BYTES else "host memory"


def described(model: StreamedModel) -> dict[str, Any]:
    """The plan's figures, and how long the same reads take alone."""
    transfer = runtime_of(model).transfer
    transfer.wait_until_idle()
    chunks = [chunk for unit in transfer.units if unit.name not in model.plan.host for chunk in unit.chunks()]
    start = time.perf_counter()
    direct_reads(chunks)()
    return {
        "link_bytes": model.plan.link_bytes,
        "disk_bytes": model.plan.pass_bytes,
        "disk_alone_s": time.perf_counter() - start if chunks else 0.0,
        "planned_device_bytes": model.plan.device_bytes,
        "reserved_bytes": model.plan.budget.reserved_bytes,
        "plan": model.plan.reason,
    }


def offload_lane(folder: Path, cap: int, host_bytes: int) -> Lane:
    """transformers' offload in the same memory; before a pass from disk the files leave the page cache."""
    from_disk = source(host_bytes) == "disk"
    return Lane(
        name=f"{cap / 2**30:g} GiB, transformers' offload, from {source(host_bytes)}",
        cap=cap,
        load=partial(offloaded, folder, cap - WORKSPACE_BYTES, "disk" if from_disk else "cpu"),
        before=partial(evict, folder) if from_disk else lambda: None,
        describe=lambda model: {"link_bytes": offloaded_bytes(model)},
    )


def airllm_lanes(folder: Path, shards: Path, cap: int) -> list[Lane]:
    """AirLLM keeps nothing on the device or in host memory between passes, and reads its files from the page cache or disk."""
    weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    make = partial(Lane, cap=cap, load=partial(airllm, folder, shards), describe=lambda _: {"link_bytes": weights_bytes})
    name = f"{cap / 2**30:g} GiB, AirLLM, from"
    return [make(name=f"{name} the page cache"), make(name=f"{name} disk", before=partial(evict, shards))]


def measure(lane: Lane, expected: torch.Tensor | None, rounds: int, seconds: float) -> tuple[BenchmarkRow, torch.Tensor]:
    """Load, compare the logits of a prompt, then time up to `rounds` passes of one token in about `seconds`."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (lane.cap or total) / total), DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    pinned_rate = measure_link(DEVICE)
    start = time.perf_counter()
    with lane.load() as model:
        load_s = time.perf_counter() - start
        with torch.no_grad():
            logits: torch.Tensor = model(IDS.to(DEVICE)).logits.cpu()
        found = timed_passes(decode_step(model, device=DEVICE), lane.before, rounds, seconds)
        conditions = {"link_bytes": 0, **lane.describe(model)}
    conditions |= {
        "cap": lane.cap,
        "load_s": load_s,
        "peak_device_bytes": torch.cuda.max_memory_allocated(DEVICE),
        "pinned_copy_rate": max(pinned_rate, measure_link(DEVICE)),
        "largest_difference": None if expected is None else float((logits.float() - expected.float()).abs().max()),
        **environment(),
    }
    walls, cpus = zip(*found, strict=True)
    return BenchmarkRow(lane.name, walls, conditions["link_bytes"], conditions, cpus), logits


def timed_passes(step: Callable[[], None], before: Callable[[], None], rounds: int, seconds: float) -> list[tuple[float, float]]:
    """`(seconds, CPU seconds)` of each pass. They follow each other at once, so that each pays for what it reads ahead; the
    first is not counted."""
    found: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(found) <= rounds and (len(found) < 2 or time.perf_counter() - began < seconds):
        before()
        start, cpu = time.perf_counter(), time.process_time()
        step()
        found.append((time.perf_counter() - start, time.process_time() - cpu))
    return found[1:]


def measure_all(lanes: list[Lane], whole: Lane | None, rounds: int, seconds: float) -> list[BenchmarkRow]:
    """Every lane's record, printed as it is made; a lane that fails has none, and its error is printed."""
    records, expected = [], None
    for lane in ([whole] if whole else []) + lanes:
        try:
            record, logits = measure(lane, expected, rounds, seconds)
        except (RabbitError, RuntimeError, ValueError, OSError) as error:  # a peer's too; too little device memory is among them
            print(f"{lane.name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        else:
            expected = logits if lane is whole else expected
            records.append(record)
            print(record.as_json(), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return records


def as_table(records: list[BenchmarkRow]) -> str:
    """One row per record."""
    lines = [
        "| cap | s a pass | slowest - fastest | over the link | of a pinned copy | of the disk | peak (planned) | logits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        c = record.conditions
        off = c["largest_difference"]
        logits = "not compared" if off is None else f"{off:.1e} off" if off else "equal"
        planned = f" ({format_bytes(c['planned_device_bytes'])})" if "planned_device_bytes" in c else ""
        moved = f"{format_bytes(record.bytes_moved)} at {format_rate(record.rate, 1)}" if record.bytes_moved else "-"
        share = f"{record.rate / c['pinned_copy_rate']:.3f}" if record.bytes_moved else "-"
        disk = f"{c['disk_alone_s'] / record.median_s:.3f}" if c.get("disk_alone_s") else "-"
        lines.append(
            f"| {record.lane} | {record.median_s:.3f} | {record.spread_s:.3f} | {moved} | {share} | {disk} | "
            f"{format_bytes(c['peak_device_bytes'])}{planned} | {logits} |"
        )
    return "\n".join(lines)


def find_lanes(folder: Path, shards: Path, caps: list[int], compressions: list[str], peers: bool) -> list[Lane]:
    """Ours, then the peers; each from host memory, then from disk. Compressed ones come from host memory alone."""
    whole_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) + LAYER_BYTES
    hosts = (whole_bytes, SMALL_HOST_BYTES)
    lanes = [rabbit_lane(folder, cap, host_bytes) for host_bytes in hosts for cap in caps]
    lanes += compressed_lanes(folder, shards / "rabbit_engine", caps, whole_bytes, compressions)
    if peers:
        of_airllm = airllm_lanes(folder, shards / "airllm", max(caps)) if has_airllm() else ()
        for host_bytes, also in zip_longest(hosts, of_airllm):
            lanes += [offload_lane(folder, cap, host_bytes) for cap in caps]
            lanes += [also] if also else []
    return lanes


def main(
    folder: Annotated[
        Path | None, typer.Option(help="Where the model is written and kept; a temporary folder by default.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="By default as many as the disk has room for, at most 16.")] = None,
    caps: Annotated[str, typer.Option(help="Device memory in GiB, one run each.")] = "8,4,2",
    rounds: Annotated[int, typer.Option(min=1, help="The most passes to time of each.")] = 5,
    seconds: Annotated[float, typer.Option(help="After this long no other pass is timed.")] = 60,
    compressions: Annotated[str, typer.Option(help="Lanes of compressed shards, as 4bit,8bit.")] = "",
    peers: Annotated[bool, typer.Option(help="Time transformers' offload and AirLLM too.")] = False,
    only: Annotated[str, typer.Option(help="Only lanes whose names this regular expression finds.")] = "",
    prepare: Annotated[bool, typer.Option(help="Only write the model, compressed shards, and AirLLM's files.")] = False,
) -> None:
    """Make the model, run every cap from host memory and from disk, print the records and a table."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device: nothing was measured")
    with tempfile.TemporaryDirectory() as scratch:
        target = folder or Path(scratch) / "llama-70b-shape"
        target.mkdir(parents=True, exist_ok=True)
        room = int(0.8 * shutil.disk_usage(target).free) - 3 * LAYER_BYTES
        count = layers or max(2, min(16, room // LAYER_BYTES))
        make_checkpoint(target, count)
        shards = target.with_name(f"{target.name}-shards")
        compressed = [part for part in compressions.split(",") if part]
        make_shards(target, shards / "rabbit_engine", compressed)
        if prepare:
            with airllm(target, shards / "airllm") if peers and has_airllm() else tempfile.TemporaryDirectory():
                return
        fits = (count + 4) * LAYER_BYTES < torch.cuda.mem_get_info(DEVICE)[0]
        whole = Lane(name="no cap, transformers, resident", load=partial(resident, target)) if fits else None
        lanes = find_lanes(target, shards, [int(float(cap) * 2**30) for cap in caps.split(",")], compressed, peers)
        print(as_table(measure_all([lane for lane in lanes if re.search(only, lane.name)], whole, rounds, seconds)))


if __name__ == "__main__":
    typer.run(main)
