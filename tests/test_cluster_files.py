"""A machine's own copy of a model's files: the same files, or the extents that it needs, fetched once and never half believed."""

from __future__ import annotations

import os
import pickle
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import IDS, llama

from rabbit_engine import AutoModelForCausalLM, errors
from rabbit_engine.checkpoints import InPlace, Shards, Streamable, execute, resolve
from rabbit_engine.cluster import copies
from rabbit_engine.cluster.files import (
    Chunk,
    DriverFiles,
    FilesDescription,
    LocalModel,
    describe,
    ensure,
    extents_of,
    require_present,
)
from rabbit_engine.config import CompressionConfig, SourceConfig, SplitConfig
from rabbit_engine.storage.partial import merged, record_path, without
from rabbit_engine.storage.tensorfiles import read_header, read_tensor

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "driver" / "tiny"
    llama(**SIZES).save_pretrained(folder)
    return folder


class Driver:
    """A driver whose places this machine lacks; `sent` counts the bytes, and `stop_after` them it fails."""

    def __init__(self, folder: str | Path, source: SourceConfig | None = None, split: SplitConfig | None = None) -> None:
        resolution = resolve(folder, source or SourceConfig(), split or SplitConfig())
        self.source: Streamable = execute(resolution, progress=False)[0]
        self.here = describe(self.source)
        self.elsewhere: FilesDescription = replace(self.here, name=f"/nowhere/{Path(self.here.name).name}", driver="driver")
        self.files = DriverFiles(self.here)
        self.sent, self.stop_after, self.damage = 0, 2**62, 0

    def read(self, area: Any, name: str, offset: int, nbytes: int) -> Chunk:
        if self.sent >= self.stop_after:
            raise ConnectionError("the driver is gone")
        chunk = self.files.read(area, name, offset, nbytes)
        self.sent += nbytes
        if self.damage:
            self.damage -= 1
            return Chunk(bytes([chunk.data[0] ^ 1]) + chunk.data[1:], chunk.xxh3)
        return chunk

    def layers(self, *indexes: int) -> list[str]:
        return [name for name in self.source.entries if any(f".layers.{index}." in name for index in indexes)]

    def ensure(self, folder: Path, names: list[str]) -> LocalModel:
        return ensure(self.elsewhere, extents_of(self.source, names), self.read, folder=folder)


def opened(local: LocalModel) -> Streamable:
    return resolve(local.name, local.source, local.split).source  # type: ignore[return-value]


def weights_of(local: LocalModel) -> Path:
    (path,) = Path(local.name).glob("*.safetensors")
    return path


def assert_equal(found: Streamable, source: Streamable, names: list[str]) -> None:
    for name in names:
        assert torch.equal(read_tensor(found.entries[name]), read_tensor(source.entries[name]))


def test_a_stage_gets_its_layers_and_holes_elsewhere(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    mine = driver.layers(1, 2)
    local = driver.ensure(tmp_path / "copies", mine)
    path = weights_of(local)
    assert local.is_copy
    assert path.stat().st_size == (model_folder / path.name).stat().st_size
    assert path.stat().st_blocks * 512 < 0.6 * path.stat().st_size
    found = opened(local)
    require_present(found.entries, mine)
    assert_equal(found, driver.source, mine)
    before = driver.sent
    assert driver.ensure(tmp_path / "copies", mine) == local
    assert driver.sent == before  # once


def test_bytes_that_were_not_fetched_are_refused_and_never_read_as_zeros(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    found = opened(driver.ensure(tmp_path / "copies", driver.layers(1)))
    other = max(driver.layers(3), key=lambda name: found.entries[name].nbytes)
    with pytest.raises(errors.MissingFileError, match=r"layers\.3.*is not on .*only the layers"):
        require_present(found.entries, [*driver.layers(1), other])
    with pytest.raises(errors.MissingFileError, match="only some layers"):
        read_tensor(found.entries[other])


def test_a_copy_of_all_layers_generates_as_the_original(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    local = driver.ensure(tmp_path / "copies", list(driver.source.entries))
    with AutoModelForCausalLM.from_pretrained(local.name) as there, AutoModelForCausalLM.from_pretrained(model_folder) as here:
        assert torch.equal(there(IDS).logits, here(IDS).logits)


def test_a_model_that_lacks_layers_does_not_load_as_a_whole(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    local = driver.ensure(tmp_path / "copies", driver.layers(0, 1))
    with pytest.raises(errors.MissingFileError, match="only some layers"):
        AutoModelForCausalLM.from_pretrained(local.name)


def test_another_stage_adds_its_layers_while_the_first_reads(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    first = opened(driver.ensure(tmp_path / "copies", driver.layers(0)))
    before = driver.sent
    second = opened(driver.ensure(tmp_path / "copies", driver.layers(0, 2)))
    added = sum(driver.source.entries[name].nbytes for name in driver.layers(2) if "norm" not in name)  # small ones are there
    assert added <= driver.sent - before < 1.1 * added
    assert_equal(first, driver.source, driver.layers(0))
    assert_equal(second, driver.source, driver.layers(0, 2))


def test_two_stages_of_a_machine_fetch_at_once(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(driver.ensure, tmp_path / "copies", driver.layers(*part)) for part in ((0, 1), (2, 3))]
        (local, _) = [job.result() for job in jobs]
    assert_equal(opened(local), driver.source, driver.layers(0, 1, 2, 3))


def test_the_same_place_with_the_same_files_is_used_as_it_is(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)

    def refuse(*_: Any) -> Chunk:
        raise AssertionError("it was fetched")

    local = ensure(driver.here, extents_of(driver.source, driver.layers(1)), refuse, folder=tmp_path / "copies")
    assert not local.is_copy
    assert_equal(opened(local), driver.source, driver.layers(0, 1, 2, 3))


def test_the_same_place_with_another_version_is_refused(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    (path,) = model_folder.glob("*.safetensors")
    torch.manual_seed(1)
    trained = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    save_file(trained, path, {"format": "pt"})
    assert path.stat().st_size == next(row for row in driver.here.weights).nbytes
    row = driver.here.weights[0]
    with pytest.raises(errors.MachinesDifferError, match=rf"{path} on b .*is not that of .*{row.xxh3}") as raised:
        ensure(driver.here, (), driver.read, machine="b", folder=tmp_path / "copies")
    assert describe(execute(resolve(model_folder, SourceConfig(), SplitConfig()))[0]).weights[0].xxh3 in str(raised.value)


def test_another_config_at_the_same_place_is_refused(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    config = model_folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 2e-06'))
    with pytest.raises(errors.MachinesDifferError, match=r"config\.json on b"):
        ensure(driver.here, (), driver.read, machine="b", folder=tmp_path / "copies")


def test_a_place_that_lacks_files_is_as_one_that_is_not_there(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    small = shutil.copytree(model_folder, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    local = ensure(replace(driver.here, name=str(small)), (), driver.read, folder=tmp_path / "copies")
    assert local.is_copy


@pytest.mark.parametrize("stop_after", [1, 400_000, 2_000_000, 4_000_000])
def test_an_interrupted_fetch_is_continued(stop_after: int, model_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(copies, "CHUNK_BYTES", 2**18)
    monkeypatch.setattr(copies, "_RECORDED_CHUNKS", 2)
    driver = Driver(model_folder)
    driver.stop_after = stop_after
    mine = driver.layers(1, 2)
    with pytest.raises(ConnectionError):
        driver.ensure(tmp_path / "copies", mine)
    for path in (tmp_path / "copies").rglob("*.safetensors"):  # what is there is known to be a part
        assert any(entry.is_absent for entry in read_header(path).tensors) if path.stat().st_blocks else True
    lost, driver.stop_after = driver.sent, 2**62
    local = driver.ensure(tmp_path / "copies", mine)
    assert_equal(opened(local), driver.source, mine)
    complete = driver.sent - lost
    driver.sent = 0
    driver.ensure(tmp_path / "others", mine)
    assert complete <= driver.sent
    assert stop_after < 2**20 or complete < driver.sent - stop_after / 2


def test_a_damaged_chunk_is_asked_for_again_and_then_refused(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    driver.damage = 1
    assert_equal(opened(driver.ensure(tmp_path / "copies", driver.layers(1))), driver.source, driver.layers(1))
    driver.damage = 2**62
    with pytest.raises(errors.ClusterError, match="arrived damaged 2 times"):
        driver.ensure(tmp_path / "copies", driver.layers(2))


def test_a_damaged_record_or_file_is_fetched_again(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    path = weights_of(driver.ensure(tmp_path / "copies", driver.layers(1)))
    record = record_path(path)
    whole = record.read_bytes()
    for damage in (
        lambda: record.write_bytes(whole.replace(b"[[0", b"[[1")),
        record.unlink,
        path.unlink,
        lambda: os.truncate(path, 9),
    ):
        damage()
        local = driver.ensure(tmp_path / "copies", driver.layers(1))
        assert_equal(opened(local), driver.source, driver.layers(1))
        assert record.read_bytes() == whole


def test_a_file_that_changes_while_it_is_sent_is_refused(model_folder: Path, tmp_path: Path) -> None:
    driver = Driver(model_folder)
    (path,) = model_folder.glob("*.safetensors")
    os.utime(path, ns=(1, 1))
    with pytest.raises(errors.DamagedFileError, match="replaced while in use"):
        driver.ensure(tmp_path / "copies", driver.layers(1))
    with pytest.raises(errors.ClusterError, match="not among the model's files"):
        driver.files.read("model", "../../etc/passwd", 0, 1)


def test_room_is_checked_before_the_first_byte(model_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    driver = Driver(model_folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(
        errors.NotEnoughDiskError, match=r"fetching .* from driver needs .* 1.00 kB are free.*RABBIT_ENGINE_CACHE"
    ):
        driver.ensure(tmp_path / "copies", driver.layers(1))
    assert not driver.sent


@pytest.mark.parametrize("equal", [True, False])
def test_stored_copies_of_a_tied_weight_need_not_be_here_to_be_compared(equal: bool, tmp_path: Path) -> None:
    folder = tmp_path / "driver" / "tied"
    model = llama(**SIZES, tie_word_embeddings=True)
    model.save_pretrained(folder)
    (path,) = folder.glob("*.safetensors")
    stored = load_file(path)
    table = stored["model.embed_tokens.weight"]
    save_file({**stored, "lm_head.weight": table.clone() if equal else table + 1}, path, {"format": "pt"})
    driver = Driver(folder)
    found = opened(driver.ensure(tmp_path / "copies", driver.layers(1)))
    assert found.ties == driver.source.ties == ({"lm_head.weight": "model.embed_tokens.weight"} if equal else {})


def test_shards_are_fetched_and_loaded_as_the_driver_has_them(model_folder: Path, tmp_path: Path) -> None:
    split = SplitConfig(saving_path=tmp_path / "shards", compression=CompressionConfig(method="8bit"))
    driver = Driver(model_folder, split=split)
    assert isinstance(driver.source, Shards)
    mine = driver.layers(1, 2)
    local = driver.ensure(tmp_path / "copies", mine)
    found = opened(local)
    assert isinstance(found, Shards)
    assert not list(Path(local.name).glob("*.safetensors"))  # no original
    assert found.manifest == driver.source.manifest
    assert_equal(found, driver.source, mine)
    assert not ensure(driver.here, (), driver.read, folder=tmp_path / "copies").is_copy


def test_a_checkpoint_in_several_files_is_known_by_its_headers(tmp_path: Path) -> None:
    folder = tmp_path / "driver" / "parts"
    llama(**SIZES).save_pretrained(folder, max_shard_size="4MB")
    driver = Driver(folder)
    mine = driver.layers(3)
    local = driver.ensure(tmp_path / "copies", mine)
    copied = sorted(Path(local.name).glob("*.safetensors"))
    assert len(copied) == len(driver.here.weights) > 2
    assert sum(path.stat().st_blocks * 512 > 2**20 for path in copied) < len(copied) - 1
    assert_equal(opened(local), driver.source, mine)


def test_a_gguf_file_is_fetched_whole(tmp_path: Path) -> None:
    (tmp_path / "driver").mkdir()
    driver = Driver(gguf_files.write(tmp_path / "driver" / "tiny.gguf", "llama", "Q4_K"))
    local = driver.ensure(tmp_path / "copies", [])
    assert local.is_copy
    assert_equal(opened(local), driver.source, list(driver.source.entries))


def test_a_split_over_several_folders_is_fetched_with_its_parts(model_folder: Path, tmp_path: Path) -> None:
    split = SplitConfig(saving_path=tmp_path / "a", more_paths=(tmp_path / "b",))
    driver = Driver(model_folder, split=split)
    mine = driver.layers(1, 2)
    assert {path.parents[2].name for name in mine for path in [driver.source.entries[name].places[-1].path]} == {"a", "b"}
    local = driver.ensure(tmp_path / "copies", mine)
    found = opened(local)
    require_present(found.entries, mine)
    assert_equal(found, driver.source, mine)
    assert not ensure(driver.here, (), driver.read, folder=tmp_path / "copies").is_copy


def test_a_repo_of_the_hub_is_copied_as_its_cache_has_it(model_folder: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    snapshot = shutil.copytree(model_folder, cache / "models--org--tiny" / "snapshots" / commit)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text(commit)
    driver = Driver("org/tiny", SourceConfig(cache_dir=cache, local_files_only=True))
    assert not ensure(driver.here, (), driver.read, folder=tmp_path / "copies").is_copy
    away = replace(driver.here, source=replace(driver.here.source, cache_dir=tmp_path / "empty"))
    local = ensure(away, extents_of(driver.source, driver.layers(3)), driver.read, folder=tmp_path / "copies")
    assert local.is_copy
    assert local.name == "org/tiny"
    found = opened(local)
    assert isinstance(found, InPlace)
    assert found.repo.commit == commit
    assert_equal(found, driver.source, driver.layers(3))
    assert not found.folder.is_relative_to(snapshot)


def test_a_description_says_no_token(model_folder: Path) -> None:
    driver = Driver(model_folder, SourceConfig(token="hf_secret"))
    assert b"hf_secret" not in pickle.dumps(driver.here)


def test_spans_are_merged_and_subtracted() -> None:
    assert merged([(5, 7), (0, 2), (2, 3), (6, 9), (4, 4)]) == ((0, 3), (5, 9))
    assert merged([(0, 2), (4, 6), (20, 21)], gap=2) == ((0, 6), (20, 21))
    assert without([(0, 10), (20, 30)], [(2, 4), (8, 22), (29, 40)]) == ((0, 2), (4, 8), (22, 29))
    assert without([(0, 10)], [(0, 10)]) == ()
