"""Splits that are killed anywhere, and two at once, end with the files of one that runs undisturbed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from rabbit_engine.checkpoints import prepare
from rabbit_engine.checkpoints.shards import JOURNAL_NAME
from rabbit_engine.config import CompressionConfig, SourceConfig, SplitConfig

HARNESS = Path(__file__).with_name("killed_split.py")
WIDE = {"hidden_size": 64, "intermediate_size": 96}
"""Sizes with groups of 64 and of 32."""
Harness = Callable[..., int]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """`harness(checkpoint, saving_path, mode, *words)`: the number of children that one process, which imports everything
    once, killed."""
    told = tmp_path_factory.mktemp("harness") / "stderr"
    with (
        told.open("w") as errors,
        subprocess.Popen(
            [sys.executable, str(HARNESS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        jobs, results = process.stdin, process.stdout

        def run(*job: object) -> int:
            print(json.dumps([str(word) for word in job]), file=jobs, flush=True)
            line = results.readline()
            assert line, told.read_text()
            return int(line)

        yield run
        jobs.close()


def split(folder: Path, saving_path: Path, compression: CompressionConfig | None = None, more: tuple[Path, ...] = ()) -> None:
    config = SplitConfig(mode="always", saving_path=saving_path, compression=compression, more_paths=more)
    prepare(folder, SourceConfig(), config, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, but the lock."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize(("mode", "family"), [("events", "llama_tied"), ("timer", "mixtral")])
def test_split_killed_again_and_again_ends_with_identical_files(
    mode: str, family: str, harness: Harness, checkpoint: Any, tmp_path: Path
) -> None:
    split(checkpoint(family), tmp_path / "at once")
    kills = harness(checkpoint(family), tmp_path / "killed", mode)
    assert kills > (25 if mode == "events" else 1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "at once")


@pytest.mark.parametrize(("mode", "kills"), [("events", 25), ("both", -1)])
def test_a_split_over_two_folders_ends_with_identical_files(
    mode: str, kills: int, harness: Harness, checkpoint: Any, tmp_path: Path
) -> None:
    split(checkpoint("llama_tied"), tmp_path / "at once" / "a", more=(tmp_path / "at once" / "b",))
    assert harness(checkpoint("llama_tied"), tmp_path / "killed", mode, "onto") > kills
    once, killed = (contents(tmp_path / place) for place in ("at once", "killed"))
    assert {name: raw for name, raw in killed.items() if not name.endswith(JOURNAL_NAME)} == once  # the last child left it


@pytest.mark.parametrize("mode", ["events", "timer"])
def test_a_killed_compression_ends_with_identical_files(mode: str, harness: Harness, tmp_path: Path) -> None:
    folder = families.save("llama_tied", tmp_path / "model", torch.bfloat16, **WIDE)
    split(folder, tmp_path / "at once", CompressionConfig(method="4bit"))
    assert harness(folder, tmp_path / "killed", mode, "4bit") > (25 if mode == "events" else 1)
    once, killed = (contents(tmp_path / place) for place in ("at once", "killed"))
    killed = {name: raw for name, raw in killed.items() if not name.endswith(JOURNAL_NAME)}  # the last child left it
    assert len(once) > 5
    assert killed == once


@pytest.mark.parametrize("onto", [False, True])
def test_killed_while_deleting_originals_loses_nothing(
    onto: bool, harness: Harness, own_checkpoint: Any, tmp_path: Path, plain: Any, streamed: Any, ids: Any
) -> None:
    folder = own_checkpoint("llama", num_hidden_layers=3 if onto else 5)
    expected = plain(folder)(ids).logits
    assert len(list(folder.glob("*.safetensors"))) > 2
    kills = harness(folder, tmp_path / "shards", "events", "delete", *(["onto"] if onto else []))
    assert kills > 25
    assert list(folder.glob("*.safetensors")) == []
    with torch.no_grad():
        places = [tmp_path / "shards" / disk for disk in "ba"] if onto else tmp_path / "shards"
        model = streamed(folder, split="always", layer_shards_saving_path=places)
        assert torch.equal(model(ids).logits, expected)


def test_two_processes_at_once_end_with_one_good_split(harness: Harness, own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("qwen3_moe")
    assert harness(folder, tmp_path / "both", "both") == 0
    split(folder, tmp_path / "alone")
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")
