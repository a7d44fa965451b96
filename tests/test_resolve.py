"""One resolution: what a plan says is what loading does, decided with one model on the meta device and one map of names."""

from __future__ import annotations

import cProfile
import dataclasses
import json
import os
import pstats
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from rabbit_engine import AutoModel, errors
from rabbit_engine.checkpoints import HEADERS_ONLY, WHOLE_FILES, InPlace, MustSplit, Shards, prepare, resolve
from rabbit_engine.config import SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.planning.forecast import forecast
from rabbit_engine.transformers_bridge.weight_transforms import NameMap
from rabbit_engine.utils.speeds import Speeds

STREAM = StreamConfig(device=torch.device("cpu"), speeds=Speeds(disk=1e9, source="given"))


def load(folder: Path, **keywords: Any) -> None:
    AutoModel.from_pretrained(folder, device="cpu", max_memory={"cpu": "1MB"}, **keywords).close()


def plan(folder: Path, **keywords: Any) -> str:
    return str(forecast(folder, SourceConfig(), SplitConfig(**keywords), STREAM))


@pytest.fixture
def built() -> Iterator[list[str]]:
    """The classes of the causal models that are built from here on: each registers its head once."""
    classes: list[str] = []

    def note(module: nn.Module, name: str, _: object) -> None:
        if name == "lm_head":
            classes.append(type(module).__name__)

    handle = register_module_module_registration_hook(note)
    yield classes
    handle.remove()


def names_mapped(work: Callable[[], object]) -> int:
    """How many stored names were mapped to the model's own while `work` ran."""
    profile, code = cProfile.Profile(), NameMap.place_of.__code__
    profile.runcall(work)
    rows: dict[tuple[str, int, str], Any] = vars(pstats.Stats(profile))["stats"]
    row = rows.get((code.co_filename, code.co_firstlineno, code.co_name))
    return 0 if row is None else int(row[1])


def stored_names(folder: Path) -> int:
    files = [safe_open(path, "pt") for path in folder.glob("*.safetensors")]
    return sum(len(list(file.keys())) for file in files)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral"])
@pytest.mark.parametrize("work", [load, plan])
def test_original_files_are_resolved_with_one_model_and_one_map(
    work: Callable[..., Any], family: str, own_checkpoint: Any, built: list[str]
) -> None:
    folder = own_checkpoint(family)
    built.clear()
    assert names_mapped(lambda: work(folder)) == stored_names(folder)
    assert len(built) == 1


@pytest.mark.parametrize("work", [load, plan])
def test_an_existing_split_is_resolved_with_one_model_and_no_map(
    work: Callable[..., Any], own_checkpoint: Any, built: list[str]
) -> None:
    folder = own_checkpoint("llama")
    load(folder, split="always")
    built.clear()
    assert names_mapped(lambda: work(folder)) == 0
    assert len(built) == 1


def test_loading_info_needs_no_second_resolution(own_checkpoint: Any, built: list[str]) -> None:
    folder = own_checkpoint("llama")
    built.clear()
    assert names_mapped(lambda: load_telling(folder)) == stored_names(folder)
    assert len(built) == 1


def load_telling(folder: Path) -> None:
    model, info = AutoModel.from_pretrained(folder, device="cpu", max_memory={"cpu": "1MB"}, output_loading_info=True)
    model.close()
    assert info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def test_a_split_of_a_version_that_noted_no_unused_weights_tells_the_same(own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    path = next(folder.glob("*-of-*.safetensors"))
    save_file({**load_file(path), "score.weight": torch.ones(2, 32)}, path, metadata={"format": "pt"})
    kept = {"device": "cpu", "max_memory": {"cpu": "1MB"}, "split": "always", "output_loading_info": True}
    model, told = AutoModel.from_pretrained(folder, **kept)
    model.close()
    assert told["unexpected_keys"] == {"score.weight"}
    manifest = folder / "rabbit_shards" / "float32" / "manifest.json"
    written = json.loads(manifest.read_text())
    del written["source"]["unused_weights"]
    manifest.write_text(json.dumps(written))
    model, again = AutoModel.from_pretrained(folder, **kept)
    model.close()
    assert again == told


def test_a_split_is_made_with_the_map_that_it_was_decided_by(own_checkpoint: Any, built: list[str]) -> None:
    folder = own_checkpoint("llama")
    built.clear()
    mapped = names_mapped(lambda: load(folder, dtype="bfloat16"))
    assert (folder / "rabbit_shards" / "bfloat16" / "manifest.json").is_file()
    assert mapped == stored_names(folder)
    assert len(built) == 2  # one is converted with, the other streams


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`interrupt(folder, after=7)` splits the checkpoint until it has written to the disk that often."""

    def split(folder: Path, after: int, **keywords: Any) -> None:
        left, native = iter(range(after)), os.fsync

        def fsync(handle: int) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            native(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(KeyboardInterrupt):
                prepare(folder, SourceConfig(), SplitConfig(mode="always", **keywords), progress=False)

    return split


RESUMED = "split first, into {} (an interrupted split is resumed)"


def test_a_plan_says_that_loading_resumes_an_interrupted_split(own_checkpoint: Any, interrupt: Any) -> None:
    folder = own_checkpoint("llama")
    assert "streamed from the original files" in plan(folder)
    interrupt(folder, after=7)
    shards = folder / "rabbit_shards" / "float32"
    before = (shards / "model.layers.0.safetensors").stat()
    for split in ("auto", "always"):
        assert RESUMED.format(shards) in plan(folder, mode=split)
    assert "streamed from the original files" in plan(folder, mode="never")
    load(folder)
    assert (shards / "model.layers.0.safetensors").stat() == before  # it was kept
    assert f"streamed from the shards in {shards}" in plan(folder)


def test_a_plan_of_an_interrupted_split_knows_the_weights_of_deleted_originals(own_checkpoint: Any, interrupt: Any) -> None:
    folder = own_checkpoint("llama_wide_heads", num_hidden_layers=5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 8}))  # the weights have another
    whole, files = forecast(folder, SourceConfig(), SplitConfig(mode="always"), STREAM), len(list(folder.glob("*.safetensors")))
    interrupt(folder, after=15, delete_original=True)
    assert 0 < len(list(folder.glob("*.safetensors"))) < files
    resumed = forecast(folder, SourceConfig(), SplitConfig(), STREAM)
    assert RESUMED.format(folder / "rabbit_shards" / "float32") in str(resumed)
    assert resumed.weights_bytes == whole.weights_bytes
    load(folder)
    assert forecast(folder, SourceConfig(), SplitConfig(), STREAM).weights_bytes == whole.weights_bytes


def test_an_interrupted_split_of_other_files_is_not_resumed_and_the_plan_says_so(own_checkpoint: Any, interrupt: Any) -> None:
    folder = own_checkpoint("llama")
    interrupt(folder, after=7)
    families.save("llama_biased", folder)
    assert "split first" in plan(folder)
    assert "an interrupted split of other files is there" in plan(folder)
    load(folder)
    assert "streamed from the shards" in plan(folder)


def test_resolving_writes_nothing_and_describes_its_source(own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    before = sorted(folder.rglob("*"))
    for keywords, kind, text in (
        ({}, InPlace, "streamed from the original files"),
        ({"mode": "always"}, MustSplit, f"split first, into {folder}/rabbit_shards/float32 (as asked)"),
        ({"dtype": torch.bfloat16}, MustSplit, "stored as torch.float32, the model needs torch.bfloat16"),
        ({"mode": "never"}, InPlace, "streamed from the original files"),
    ):
        for reading in (HEADERS_ONLY, WHOLE_FILES):
            found = resolve(folder, SourceConfig(), SplitConfig(**keywords), reading=reading)
            assert isinstance(found.source, kind)
            assert text in str(found.source)
            assert str(folder) in repr(found)
            with pytest.raises(dataclasses.FrozenInstanceError):
                found.source = None
    assert sorted(folder.rglob("*")) == before
    load(folder, split="always")
    assert isinstance(resolve(folder, SourceConfig(), SplitConfig()).source, Shards)


@pytest.mark.parametrize("work", [plan, load])
def test_a_needed_split_is_refused_by_plan_and_loading_alike(work: Callable[..., Any], own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    never = {"split": "never"} if work is load else {"mode": "never"}
    with pytest.raises(errors.ConfigurationError) as caught:
        work(folder, **never, dtype=torch.bfloat16)
    assert str(caught.value) == (
        f'split="never", but {folder} must be split: lm_head.weight: stored as torch.float32, the model needs torch.bfloat16'
    )
