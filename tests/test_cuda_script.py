"""The benchmark on a GPU, as far as it can be run without one: its lanes, and the shards it makes for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_cuda

GIB = 2**30


def test_compressed_lanes_come_from_host_memory_after_the_plain_ones(tmp_path: Path) -> None:
    lanes = benchmark_cuda.find_lanes(tmp_path, tmp_path / "shards", [8 * GIB, 2 * GIB], ["4bit", "8bit"], peers=False)
    assert [lane.name for lane in lanes] == [
        "8 GiB, from host memory",
        "2 GiB, from host memory",
        "8 GiB, from disk",
        "2 GiB, from disk",
        "8 GiB, 4bit, from host memory",
        "2 GiB, 4bit, from host memory",
        "8 GiB, 8bit, from host memory",
        "2 GiB, 8bit, from host memory",
    ]


@torch.no_grad()
def test_a_compressed_lane_loads_the_shards_that_were_made_for_it(own_checkpoint: Any, tmp_path: Path, plain: Any) -> None:
    folder, shards = own_checkpoint("llama", dtype=torch.bfloat16), tmp_path / "shards"
    benchmark_cuda.make_shards(folder, shards, ["8bit"])
    made = {path: path.stat().st_mtime_ns for path in shards.rglob("*.safetensors")}
    (lane,) = benchmark_cuda.compressed_lanes(folder, shards, [GIB], GIB, ["8bit"])
    load: Any = lane.load
    with load.func(*load.args, **{**load.keywords, "device": "cpu", "max_memory": None}) as model:
        logits, expected = model(benchmark_cuda.IDS[:, :8]).logits, plain(folder)(benchmark_cuda.IDS[:, :8]).logits
        assert 0 < float((logits - expected).abs().max()) < 0.05 * float(expected.abs().max())
        assert lane.describe(model)["planned_device_bytes"] == model.plan.device_bytes
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*.safetensors")} == made
    assert made
