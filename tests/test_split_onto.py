"""A split over several folders: large weights lie in all of them by turns; each folder's manifest names its own files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import IDS, llama, mixtral

from rabbit_engine import AutoModelForCausalLM, errors
from rabbit_engine.checkpoints import prepare, splitter, striping, verify_shard
from rabbit_engine.checkpoints.shards import MANIFEST_NAME, read_manifest
from rabbit_engine.cli import main
from rabbit_engine.config import CompressionConfig, SourceConfig, SplitConfig
from rabbit_engine.model.auto import read_settings
from rabbit_engine.storage.tensorfiles import read_tensor
from rabbit_engine.streaming.transfer import measure

SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}


@pytest.fixture(autouse=True)
def _small_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(striping, "LEAST_BYTES", 16384)
    monkeypatch.setattr(striping, "CHUNK_BYTES", 65536)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(**SIZES).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    return [tmp_path / "b disk", tmp_path / "a,disk"]


def split(folder: Path, disks: list[Path], repair: bool = False, **keywords: Any) -> Any:
    first, *more = disks
    config = SplitConfig(mode="always", saving_path=first, more_paths=tuple(more), **keywords)
    return prepare(folder, SourceConfig(), config, progress=False, repair=repair)


def files_in(disk: Path) -> list[Path]:
    return sorted(disk.rglob("*.safetensors"))


def load(folder: Path, disks: Any, **keywords: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, layer_shards_saving_path=disks, **keywords)


@pytest.mark.parametrize("count", [2, 3])
def test_every_large_weight_lies_in_all_folders_by_turns(count: int, folder: Path, tmp_path: Path) -> None:
    disks = [tmp_path / f"disk{index}" for index in range(count)]
    source = split(folder, disks)
    state = llama(**SIZES).state_dict()
    for name, entry in source.entries.items():
        assert torch.equal(read_tensor(entry), state[name])
        where = [next(index for index, disk in enumerate(disks) if place.path.is_relative_to(disk)) for place in entry.places]
        if entry.nbytes >= count * 16384:
            assert where == [index % count for index in range(len(where))]
            assert all(place.offset % 4096 == 0 and place.nbytes <= 65536 for place in entry.places)
            assert all(place.nbytes % 4096 == 0 for place in entry.places[:-1])
        else:
            assert len(where) == 1
    sizes = [sum(path.stat().st_size for path in files_in(disk)) for disk in disks]
    assert max(sizes) < 1.25 * min(sizes)


@pytest.mark.parametrize("compression", [None, "8bit", "4bit", "lossless"])
def test_a_model_computes_as_from_one_folder(compression: Any, folder: Path, disks: list[Path], tmp_path: Path) -> None:
    keywords = {"compression": compression, "dtype": torch.bfloat16 if compression == "lossless" else None}
    with (
        load(folder, disks, **keywords) as several,
        load(folder, tmp_path / "one", **keywords) as one,
        torch.inference_mode(),
    ):
        assert torch.equal(several(IDS).logits, one(IDS).logits)
        assert {place.path.parents[2] for entry in several._checkpoint.entries.values() for place in entry.places} == set(disks)


def test_experts_in_one_tensor_are_read_one_by_one(disks: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(striping, "LEAST_BYTES", 1024)
    monkeypatch.setattr(striping, "CHUNK_BYTES", 4096)
    mixtral().save_pretrained(tmp_path / "experts")
    with load(tmp_path / "experts", disks, max_memory={"cpu": 94_208}) as model, torch.inference_mode():
        assert torch.equal(model(IDS).logits, mixtral()(IDS).logits)
        cut = [unit for units in model._assembly.partition.experts.values() for unit in units if len(unit.extents) > 2]
        assert cut  # experts whose rows lie in both folders


def test_rows_of_an_embedding_are_read_from_all_folders(folder: Path, disks: list[Path], streamed: Any) -> None:
    model, ids = streamed(folder, layer_shards_saving_path=disks), torch.arange(300)[None]
    assert re.search(r"by row.*model\.embed_tokens", str(model.plan))
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, llama(**SIZES)(ids).logits)


def test_the_order_of_the_folders_does_not_matter(folder: Path, disks: list[Path]) -> None:
    def settings(paths: Any) -> SplitConfig:
        return read_settings({"layer_shards_saving_path": paths}).split

    assert settings(disks) == settings(disks[::-1])
    first = split(folder, disks)
    written = [path.stat().st_mtime_ns for disk in disks for path in files_in(disk)]
    assert split(folder, disks[::-1]).manifest == first.manifest
    assert [path.stat().st_mtime_ns for disk in disks for path in files_in(disk)] == written


def test_each_manifest_names_the_files_of_its_own_folder(folder: Path, disks: list[Path]) -> None:
    split(folder, disks)
    for index, disk in enumerate(disks):
        (path,) = disk.rglob(MANIFEST_NAME)
        manifest = read_manifest(path.parent)
        assert manifest is not None
        assert json.loads(path.read_text())["stripe"] == {"index": index, "count": 2}
        assert {record.file for record in manifest.shards} == {path.name for path in files_in(disk)}
        for record in manifest.shards:
            verify_shard(path.parent, record, manifest)


def test_damage_in_any_folder_is_found(folder: Path, disks: list[Path]) -> None:
    source = split(folder, disks)
    for disk in disks:
        path = files_in(disk)[1]
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(errors.DamagedShardError, match=path.name):
            split(folder, disks)
        assert split(folder, disks, repair=True).manifest == source.manifest
        assert path.read_bytes() == whole


def test_parts_in_the_wrong_folders_are_made_again(folder: Path, disks: list[Path]) -> None:
    split(folder, disks)
    for disk in disks:
        next(disk.rglob(MANIFEST_NAME)).unlink()  # as if it had been killed
    parts = [next(disk.rglob("*.safetensors")).parent for disk in disks]
    for source, target in ((parts[0], folder / "aside"), (parts[1], parts[0]), (folder / "aside", parts[1])):
        source.rename(target)
    state = llama(**SIZES).state_dict()
    assert all(torch.equal(read_tensor(entry), state[name]) for name, entry in split(folder, disks).entries.items())


def test_folders_of_different_splits_are_not_mixed(folder: Path, disks: list[Path], tmp_path: Path) -> None:
    split(folder, disks)
    stored = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    others = [tmp_path / "c", tmp_path / "d"]
    split(folder, others)
    shutil.rmtree(disks[1])
    shutil.copytree(others[1], disks[1])
    with pytest.raises(errors.DamagedShardError, match="is of another split than"):
        split(folder, disks)
    shutil.rmtree(disks[1])
    shutil.copytree(disks[0], disks[1])
    with pytest.raises(errors.DamagedShardError, match=r"number 1 of 2.*number 1 of 2"):
        split(folder, disks)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"file": "../../../precious.safetensors"}, "leads outside"),
        ({"name": "/precious", "file": "/precious.safetensors"}, "leads outside"),
    ],
)
def test_a_manifest_may_not_name_a_file_elsewhere(change: Any, expected: str, folder: Path, disks: list[Path]) -> None:
    split(folder, disks)
    (path,) = disks[1].rglob(MANIFEST_NAME)
    values = json.loads(path.read_text())
    values["shards"][0].update(change)
    path.write_text(json.dumps(values))
    with pytest.raises(errors.DamagedShardError, match=expected):
        split(folder, disks)


@pytest.mark.parametrize(
    "said", [{"index": 2, "count": 2}, {"index": 0, "count": 1}, {"index": "0", "count": 2}, {"index": -1}, 3]
)
def test_a_stripe_that_cannot_be_is_refused(said: Any, folder: Path, disks: list[Path]) -> None:
    split(folder, disks)
    (path,) = disks[1].rglob(MANIFEST_NAME)
    path.write_text(json.dumps({**json.loads(path.read_text()), "stripe": said}))
    with pytest.raises(errors.DamagedShardError, match=r"cannot be read: .*(stripe|index)"):
        split(folder, disks)


def test_a_killed_split_resumes_to_identical_files(folder: Path, disks: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    split(folder, disks)
    whole = {path.name + str(index): path.read_bytes() for index, disk in enumerate(disks) for path in files_in(disk)}
    native, calls = {"shard": splitter.write_shard, "manifest": splitter.write_manifest}, {"left": 0}

    def counted(kind: str) -> Any:
        def write(*arguments: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] < 0:
                raise KeyboardInterrupt
            return native[kind](*arguments)

        return write

    monkeypatch.setattr(splitter, "write_shard", counted("shard"))
    monkeypatch.setattr(splitter, "write_manifest", counted("manifest"))
    others = [tmp_path / "c", tmp_path / "d"]
    shutil.copytree(folder, tmp_path / "copy" / "model")
    for left in range(14):
        calls["left"] = left
        try:
            split(tmp_path / "copy" / "model", others, delete_original=True)
        except KeyboardInterrupt:
            continue
        break
    else:
        raise AssertionError("it never ended")
    assert left > 1
    assert {path.name + str(index): len(path.read_bytes()) for index, disk in enumerate(others) for path in files_in(disk)} == {
        name: len(raw) for name, raw in whole.items()
    }
    assert not list((tmp_path / "copy" / "model").glob("*.safetensors"))
    state = llama(**SIZES).state_dict()
    source = split(tmp_path / "copy" / "model", others)
    assert all(torch.equal(read_tensor(entry), state[name]) for name, entry in source.entries.items())


def test_one_of_the_folders_alone_is_refused_with_what_to_pass(folder: Path, disks: list[Path]) -> None:
    split(folder, disks, delete_original=True)
    assert not list(folder.glob("*.safetensors"))
    with pytest.raises(errors.CheckpointNotFoundError, match=r"layer_shards_saving_path=\[all 2 folders\]$"):
        load(folder, disks[0])
    with load(folder, disks) as model, torch.inference_mode():
        assert torch.equal(model(IDS).logits, llama(**SIZES)(IDS).logits)


def test_the_disks_rate_is_measured_in_proportion_to_their_bytes(tmp_path: Path) -> None:
    mib = 2**20
    disks = [{tmp_path / "a": ((0, 400 * mib),)}, {tmp_path / "b": ((mib, 200 * mib),), tmp_path / "small": ((0, mib),)}]
    sample = measure._sample(disks, 8 * mib)
    assert [extent.path.name for extent in sample].count("a") == 16
    assert "".join(extent.path.name for extent in sample[:6]) == "abaaba"
    for extent in sample:
        (first, stop), *_ = disks[extent.path.name == "b"][extent.path]
        assert first <= extent.offset <= stop - 8 * mib
        assert extent.offset % 4096 == 0


def test_the_commands_take_several_folders(folder: Path, tmp_path: Path, capsys: Any) -> None:
    def told(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        assert ended.value.code == code
        found = capsys.readouterr()
        return re.sub(r"[\s│]+", " ", found.err) if code else str(found.out)

    onto = f"{tmp_path / 'x'},{tmp_path / 'y'}"
    made = told("split", str(folder), "--onto", onto)
    assert re.search(r"shards, .* in \S+/x/\S+ and \S+/y/\S+-over2$", made.strip())
    assert "streamed from the shards in" in told("plan", str(folder), "--device", "cpu", "--onto", onto)
    assert "one folder" in told("split", str(folder), "--onto", str(tmp_path), code=2)
    assert "empty" in told("split", str(folder), "--onto", f"{tmp_path},", code=2)
    assert "leave out one" in told("split", str(folder), "--onto", onto, "--saving-path", str(tmp_path), code=2)


def test_a_folder_named_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="names a folder twice"):
        load(folder, [tmp_path, str(tmp_path) + "/."])
    for wrong in ([], [""], [tmp_path, None], [3]):
        with pytest.raises(errors.ConfigurationError, match="layer_shards_saving_path"):
            load(folder, wrong)


def test_compressed_components_are_spread_too(folder: Path, disks: list[Path]) -> None:
    source = split(folder, disks, compression=CompressionConfig(method="8bit"))
    entry = source.entries["model.layers.0.mlp.up_proj.weight"]
    assert entry.encoding is not None
    assert len({place.path for place in entry.components[0].places}) == 2
