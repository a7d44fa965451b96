"""A split is whole or resumes: full disks, flipped bits, cut files, read-only folders."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch

from rabbit_engine import errors
from rabbit_engine.checkpoints import prepare, splitter
from rabbit_engine.checkpoints.shards import JOURNAL_NAME, MANIFEST_NAME, read_entries, read_manifest, verify_shard
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.storage.tensorfiles import read_tensor


@pytest.fixture
def streamed(streamed: Any) -> Any:
    """Streamed from shards, where the original files would do."""
    return lambda folder, **keywords: streamed(folder, **{"split": "always", **keywords})


def split(folder: Path, saving_path: Path | None = None, **keywords: Any) -> Any:
    repair = keywords.pop("repair", False)
    return prepare(
        folder, SourceConfig(), SplitConfig(mode="always", saving_path=saving_path, **keywords), progress=False, repair=repair
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, but the lock."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def interrupted_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Split until model.layers.1; the names of the shards begun, by later splits too."""
    written: list[str] = []
    native = splitter.write_shard

    def write(path: Path, *arguments: Any) -> Any:
        written.append(path.stem)
        if path.stem == "model.layers.1" and written.count(path.stem) == 1:
            raise KeyboardInterrupt
        return native(path, *arguments)

    monkeypatch.setattr(splitter, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        split(folder)
    return written


def test_finished_shards_are_not_made_again(own_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_checkpoint("llama")
    written = interrupted_split(folder, monkeypatch)
    split(folder)
    assert written == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.1", "model.layers.2", "model.norm", "lm_head",
    ]  # fmt: skip


def test_weights_are_those_that_transformers_loads(checkpoint: Any, plain: Any, tmp_path: Path) -> None:
    for family in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma3", "phi3"):
        prepared = split(checkpoint(family), tmp_path)
        state = plain(checkpoint(family)).state_dict()
        entries = read_entries(prepared.folder, prepared.manifest)
        assert set(entries) | set(prepared.manifest.ties) == set(state)
        assert all(torch.equal(read_tensor(entry), state[name]) for name, entry in entries.items())


def damaged(folder: Path, change: Callable[[Path], None]) -> Path:
    """One shard, changed."""
    path = split(folder).folder / "model.layers.1.safetensors"
    change(path)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path, position: int | None = None) -> None:
    raw = bytearray(path.read_bytes())
    raw[random.Random(3).randrange(4096, len(raw)) if position is None else position] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "change", [cut, lambda p: p.unlink(), lambda p: flip(p, 40), lambda p: p.write_bytes(b""), lambda p: flip(p, 3)]
)
def test_damaged_shard_is_an_error_that_names_it_and_split_mends_it(change: Any, own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("llama")
    before = contents(split(folder).folder)
    damaged(folder, change)
    with pytest.raises(errors.DamagedShardError, match=r"model\.layers\.1\.safetensors"):
        streamed(folder)
    split(folder, repair=True)
    assert contents(split(folder).folder) == before


def test_flipped_bit_in_the_data_is_found_by_verify(own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    path = damaged(folder, flip)
    manifest = read_manifest(path.parent)
    assert manifest is not None
    found = []
    for record in manifest.shards:
        try:
            verify_shard(path.parent, record)
        except errors.DamagedShardError as error:
            found.append(str(error))
    assert len(found) == 1
    assert str(path) in found[0]
    path.unlink()
    split(folder, repair=True)
    for record in manifest.shards:
        verify_shard(path.parent, record)


@pytest.mark.parametrize("options", [(), ("--compression", "4bit")])
def test_damage_without_originals_names_the_steps_that_mend_it(options: Any, own_checkpoint: Any, rabbit: Any) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16, hidden_size=64)
    originals = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert rabbit("split", folder, *options, "--delete-original").code == 0
    shards = next(path for path in (folder / "rabbit_shards").iterdir() if path.is_dir())
    advice = f"its originals were deleted: put them back, delete {shards}, then run `rabbit split` with the same options"
    flip(shards / "model.layers.1.safetensors")
    assert advice in rabbit("verify", folder).err
    cut(shards / "model.layers.1.safetensors")
    for command in ("verify", folder), ("split", folder, *options), ("run", folder, "hi", *options, "--device", "cpu"):
        done = rabbit(*command)
        assert done.code == 1
        assert advice in done.err
    for path, raw in originals.items():
        path.write_bytes(raw)
    shutil.rmtree(shards)
    assert rabbit("split", folder, *options).code == 0
    assert rabbit("verify", folder).code == 0


def test_damaged_manifest_names_itself(own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    path = split(folder).folder / MANIFEST_NAME
    path.write_text(path.read_text()[:100])
    with pytest.raises(errors.DamagedShardError, match=r"manifest\.json cannot be read"):
        split(folder)
    split(folder, repair=True)


def test_changed_source_is_noticed(own_checkpoint: Any, streamed: Any, plain: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama")
    first = streamed(folder)(ids).logits
    model = families.build("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(folder, max_shard_size="60KB")
    with torch.no_grad():
        second = streamed(folder)(ids).logits
        assert torch.equal(second, plain(folder)(ids).logits)
    assert not torch.equal(first, second)


def test_a_split_of_deleted_originals_is_never_overwritten(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama")
    before = contents(split(folder, delete_original=True).folder)
    streamed(folder)(ids)
    families.save("llama_biased", folder)
    with pytest.raises(errors.ShardError, match="only copy"):
        split(folder)
    assert contents(folder / "rabbit_shards" / "float32") == before


def test_delete_original_after_the_fact_and_only_then(own_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_checkpoint("llama")
    prepared = split(folder)
    originals = sorted(p.name for p in folder.glob("*.safetensors"))
    flip(prepared.folder / "model.layers.2.safetensors")
    with pytest.raises(errors.DamagedShardError):
        split(folder, delete_original=True)
    assert sorted(p.name for p in folder.glob("*.safetensors")) == originals
    (prepared.folder / "model.layers.2.safetensors").unlink()
    split(folder, repair=True)
    assert split(folder, delete_original=True).manifest.source["deleted"]
    assert list(folder.glob("*.safetensors")) == []


def test_full_disk_is_counted_before_the_first_byte(own_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_checkpoint("llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    with pytest.raises(errors.NotEnoughDiskError, match=r"needs .* kB in .*50\.00 kB are free.*delete_original"):
        split(folder, tmp_path / "shards")
    assert list((tmp_path / "shards").rglob("*.safetensors")) == []


def test_disk_that_fills_up_midway_leaves_no_half_shard(
    own_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_checkpoint("llama")
    synced: list[int] = []
    native = os.fsync

    def fsync(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 7:
            raise OSError(28, "No space left on device")
        native(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(errors.NotEnoughDiskError, match="No space left"):
        split(folder, tmp_path / "full")
    monkeypatch.undo()
    assert not [p for p in (tmp_path / "full").rglob("*") if "scratch" in p.name or p.name == MANIFEST_NAME]
    split(folder, tmp_path / "full")
    split(folder, tmp_path / "free")
    assert contents(tmp_path / "full") == contents(tmp_path / "free")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that even root cannot write: /proc")
def test_a_read_only_folder_is_an_error_with_advice(checkpoint: Any) -> None:
    with pytest.raises(errors.ShardsNotWritableError, match="layer_shards_saving_path"):
        split(checkpoint("llama"), Path("/proc/rabbit"))


def test_split_on_a_read_only_disk_still_streams(own_checkpoint: Any, streamed: Any, ids: torch.Tensor, monkeypatch: Any) -> None:
    folder = own_checkpoint("llama")
    split(folder)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    streamed(folder)(ids)


def test_memory_stays_near_one_layer(tmp_path: Path) -> None:
    """Peak memory beyond what the imports take, of a split of 240 MB in one file, with 12 MB a layer."""
    keywords = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 18, "head_dim": 128, "vocab_size": 512}
    families.build("llama", **keywords).save_pretrained(tmp_path, max_shard_size="10GB")
    weights = (tmp_path / "model.safetensors").stat().st_size
    code = """
import resource, sys, threading, time
from pathlib import Path
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.checkpoints import prepare, splitter
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
prepare(Path(sys.argv[2]), SourceConfig(), SplitConfig(mode="always"), progress=False)
before, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident()); time.sleep(0.0005)
thread = threading.Thread(target=watch); thread.start()
prepare(Path(sys.argv[1]), SourceConfig(), SplitConfig(mode="always"), progress=False)
done = True; thread.join(); print(peak - before)
"""
    families.save("llama", tmp_path / "warm")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "warm")], capture_output=True, text=True, check=True
    )
    assert weights > 200e6
    assert int(done.stdout) < 0.35 * weights


def test_interrupted_split_of_another_checkpoint_is_not_gone_on_with(
    own_checkpoint: Any, streamed: Any, plain: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_checkpoint("llama")
    interrupted_split(folder, monkeypatch)
    for path in folder.glob("model*"):
        path.unlink()
    model = families.build("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
        model.save_pretrained(folder)
        assert torch.equal(streamed(folder)(ids).logits, plain(folder)(ids).logits)


def test_two_folders_of_one_name_share_a_saving_path(tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor) -> None:
    first, second = (families.save("llama", tmp_path / parent / "model") for parent in ("a", "b"))
    model = families.build("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
        model.save_pretrained(second, max_shard_size="60KB")
        models = [streamed(folder, layer_shards_saving_path=tmp_path / "shards") for folder in (first, second)]
        for _ in range(2):
            for folder, loaded in zip((first, second), models, strict=True):
                assert torch.equal(loaded(ids).logits, plain(folder)(ids).logits)


def test_a_split_replaced_under_a_loaded_model_is_an_error(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama")
    model = streamed(folder)
    model(ids)
    shutil.rmtree(split(folder).folder)
    split(folder)
    with pytest.raises(errors.DamagedShardError, match="was replaced while in use: load the model again"):
        model(ids)


def test_deleted_original_does_not_make_way_for_another(
    own_checkpoint: Any, streamed: Any, smollm: Path, ids: torch.Tensor
) -> None:
    folder = own_checkpoint("llama")
    (folder / "other.gguf").symlink_to(smollm)
    first = streamed(folder, delete_original=True)(ids).logits
    (folder / "pytorch_model.bin").write_bytes(b"older")
    assert torch.equal(streamed(folder)(ids).logits, first)
    with pytest.raises(errors.ConfigurationError, match="also holds the config and the tokenizer"):
        split(smollm, folder, delete_original=True)
    assert smollm.is_file()


def test_files_in_subfolders_keep_their_names(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama")
    expected = streamed(folder)(ids).logits
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-0000", "parts/model-0000"))
    (folder / "parts").mkdir()
    for path in folder.glob("model-*.safetensors"):
        path.rename(folder / "parts" / path.name)
    before = contents(split(folder).folder)
    assert contents(split(folder).folder) == before
    assert torch.equal(streamed(folder, delete_original=True)(ids).logits, expected)
    assert list((folder / "parts").iterdir()) == []


def test_one_file_is_taken_before_an_index_as_transformers_does(own_checkpoint: Any, streamed: Any, plain: Any, ids: Any) -> None:
    folder = own_checkpoint("llama")
    model = families.build("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
        index = (folder / "model.safetensors.index.json").read_text()
        model.save_pretrained(folder)
        (folder / "model.safetensors.index.json").write_text(index)
        assert torch.equal(streamed(folder)(ids).logits, plain(folder)(ids).logits)


def test_config_without_a_dtype_still_finds_its_split_after_deletion(
    own_checkpoint: Any, streamed: Any, ids: torch.Tensor
) -> None:
    folder = own_checkpoint("llama")
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("dtype")
    (folder / "config.json").write_text(json.dumps(raw))
    first = streamed(folder, delete_original=True)(ids).logits
    assert torch.equal(streamed(folder)(ids).logits, first)


def test_manifest_describes_its_source(own_checkpoint: Any) -> None:
    prepared = split(own_checkpoint("llama_tied"))
    raw = json.loads((prepared.folder / MANIFEST_NAME).read_text())
    assert raw["dtype"] == "float32"
    assert raw["ties"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert [row["name"] for row in raw["source"]["files"]] == sorted(p.name for p in prepared.repo.folder.glob("*.safetensors"))
    assert all((prepared.folder / row["file"]).stat().st_size == row["file_bytes"] for row in raw["shards"])
    assert not (prepared.folder / JOURNAL_NAME).exists()


def test_a_disk_that_fails_a_write_is_named(own_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_checkpoint("llama")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(errors.ShardsNotWritableError, match=r"journal\.json cannot be written \(Input/output error\)"):
        split(folder)
