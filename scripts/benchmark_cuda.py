"""On an NVIDIA GPU: layers of a 70B in 8, 4 and 2 GiB of device memory, compared with a pinned copy and the resident model.

    python scripts/benchmark_cuda.py [--folder DIR] [--layers N] [--caps 8,4,2] [--rounds N]

Makes a random Llama with the shape of a 70B (1.7 GB a layer in bf16), with as many layers as DIR has room for. For each cap
and each source of the weights (host memory, disk) it prints seconds per pass, the host-to-device rate relative to a pinned
copy, planned and peak device memory, and whether logits equal the resident model's. The last lines are JSON records.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rabbit_engine import AutoModel
from rabbit_engine.architectures import build_skeleton
from rabbit_engine.diagnostics.benchmark import BenchmarkRow, decode_step, interleaved
from rabbit_engine.streaming.transfer.measure import measure_link
from rabbit_engine.utils.platform import environment
from rabbit_engine.utils.sizes import format_bytes, format_rate

DEVICE = torch.device("cuda", 0)
LAYER_BYTES = 1_711_308_800
WORKSPACE_BYTES = 384 * 2**20
"""The part of a cap that is not for weights: cuBLAS, logits, the caching allocator's rounding."""

TOKENS = 256


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
    for index, names in enumerate(parts.values()):
        file = f"model-{index:05d}.safetensors"
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


def resident_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor | None:
    """The whole model's logits on the device, or None if the model does not fit there."""
    needed = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if needed > 0.9 * torch.cuda.mem_get_info(DEVICE)[0]:
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": 0}).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids.to(DEVICE)).logits.cpu()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return logits


def run(folder: Path, cap: int, host_bytes: int, ids: torch.Tensor, expected: torch.Tensor | None, rounds: int) -> BenchmarkRow:
    """One cap and one host budget; `rounds`, interleaved with a pinned copy."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    max_memory: dict[int | str, int | str] = {0: cap - WORKSPACE_BYTES, "cpu": host_bytes}
    with AutoModel.from_pretrained(folder, device=DEVICE, max_memory=max_memory, max_seq_len=TOKENS) as model:
        with torch.no_grad():
            logits = model(ids).logits.cpu()
        rates: list[float] = []
        lanes = {"pinned copy": lambda: rates.append(measure_link(DEVICE)), "decode": decode_step(model)}
        found = interleaved(lanes, rounds, 1, lambda: None)["decode"]
        plan = model.plan
    peak = torch.cuda.max_memory_allocated(DEVICE)
    conditions = {
        "cap": cap,
        "peak_device_bytes": peak,
        "planned_device_bytes": plan.device_bytes,
        "reserved_bytes": plan.budget.reserved_bytes,
        "disk_bytes": plan.pass_bytes,
        "pinned_copy_rate": max(rates),
        "equal_logits": None if expected is None else bool(torch.equal(logits, expected)),
        "largest_difference": None if expected is None else float((logits.float() - expected.float()).abs().max()),
        "plan": plan.reason,
        **environment(),
    }
    gc.collect()
    torch.cuda.empty_cache()
    lane = f"{cap / 2**30:.0f} GiB, {'from disk' if plan.pass_bytes else 'from host memory'}"
    return BenchmarkRow(lane, tuple(wall for wall, _ in found), plan.link_bytes, conditions, tuple(cpu for _, cpu in found))


def as_table(records: list[BenchmarkRow]) -> str:
    """One row per record."""
    lines = [
        "| cap | s a pass | over the link | of a pinned copy | peak on device (planned) | logits |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        c = record.conditions
        equal = (
            "not compared"
            if c["equal_logits"] is None
            else "equal"
            if c["equal_logits"]
            else f"{c['largest_difference']:.1e} off"
        )
        lines.append(
            f"| {record.lane} | {record.median_s:.3f} | {format_bytes(record.bytes_moved)} at {format_rate(record.rate, 1)} | "
            f"{record.rate / c['pinned_copy_rate']:.3f} | {format_bytes(c['peak_device_bytes'])} "
            f"({format_bytes(c['planned_device_bytes'])}) | {equal} |"
        )
    return "\n".join(lines)


def main(
    folder: Annotated[
        Path | None, typer.Option(help="Where the model is written and kept; a temporary folder by default.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="By default as many as the disk has room for, at most 16.")] = None,
    caps: Annotated[str, typer.Option(help="Device memory in GiB, one run each.")] = "8,4,2",
    rounds: int = 5,
) -> None:
    """Make the model, run every cap from host memory and from disk, print a table and the records."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device: nothing was measured")
    with tempfile.TemporaryDirectory() as scratch:
        target = folder or Path(scratch) / "llama-70b-shape"
        target.mkdir(parents=True, exist_ok=True)
        room = int(0.8 * shutil.disk_usage(target).free) - 3 * LAYER_BYTES
        count = layers or max(2, min(16, room // LAYER_BYTES))
        make_checkpoint(target, count)
        ids = torch.arange(2, 34)[None]
        expected = resident_logits(target, ids)
        whole = (count + 3) * LAYER_BYTES
        budgets: list[tuple[int, Any]] = [(int(float(cap) * 2**30), host) for cap in caps.split(",") for host in (whole, 2**30)]
        records = [run(target, cap, host, ids, expected, rounds) for cap, host in budgets]
    print(as_table(records))
    for record in records:
        print(record.as_json())


if __name__ == "__main__":
    typer.run(main)
