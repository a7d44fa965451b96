"""Nothing outside of the model's own folder is deleted or written, whatever a manifest, a journal or a link says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import families
import pytest
import torch
from editing import edited

from rabbit_engine import AutoModel, errors
from rabbit_engine.checkpoints import prepare
from rabbit_engine.config import SourceConfig, SplitConfig


def split(folder: Path, **keywords: Any) -> Any:
    return prepare(folder, SourceConfig(), SplitConfig(mode="always", **keywords), progress=False)


NORM = "model.norm.weight"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder outside of the checkpoint with files that a name may lead to."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("precious.txt", "model-00001-of-00003.safetensors"):
        (folder / name).write_text("mine")
    return folder


def untouched(folder: Path) -> bool:
    return {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        ("precious.txt", "model-00001-of-00003.safetensors"), "mine"
    )


MANIFESTS: dict[str, Any] = {
    "used climbs": lambda m: m["source"].update(used=["../outside/precious.txt"]),
    "used is no original": lambda m: m["source"].update(used=["config.json"]),
    "files climb": lambda m: [row.update(name="../outside/precious.txt") for row in m["source"]["files"][:1]],
    "a file twice": lambda m: m["source"]["files"].append(m["source"]["files"][0]),
    "deleted is text": lambda m: m["source"].update(deleted="yes"),
    "no commit": lambda m: m["source"].pop("commit"),
    "format unknown": lambda m: m["source"].update(format="zip"),
    "bytes are a float": lambda m: m["source"]["files"][0].update(bytes=1.0),
    "a shard's file climbs": lambda m: m["shards"][0].update(file="../../../outside/precious.txt"),
    "a shard's file is another's": lambda m: m["shards"][0].update(file=m["shards"][1]["file"]),
    "a shard's size is negative": lambda m: m["shards"][0].update(file_bytes=-1),
    "a shard twice": lambda m: m["shards"].append(m["shards"][0]),
    "a shard is null": lambda m: m["shards"].append(None),
    "shards are an object": lambda m: m.update(shards={}),
    "dtype unknown": lambda m: m.update(dtype="int8"),
    "version is true": lambda m: m.update(version=True),
    "version of later": lambda m: m.update(version=2),
    "a tie to nothing": lambda m: m.update(ties={"lm_head.weight": "no.such.weight"}),
    "a tie to itself": lambda m: m.update(ties={NORM: NORM}),
    "a tie to null": lambda m: m.update(ties={"lm_head.weight": None}),
    "ties are a list": lambda m: m.update(ties=[]),
}


@pytest.fixture(scope="module")
def split_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its split; copy it."""
    folder = families.save("llama", tmp_path_factory.mktemp("split"))
    split(folder)
    return folder


@pytest.mark.parametrize("fault", list(MANIFESTS))
def test_a_manifest_of_other_values_is_named(fault: str, split_llama: Path, tmp_path: Path, precious: Path) -> None:
    folder = shutil.copytree(split_llama, tmp_path / "llama")
    edited(folder / "rabbit_shards/float32/manifest.json", MANIFESTS[fault])
    for delete in (False, True):
        with pytest.raises(errors.DamagedShardError, match=r"manifest\.json (cannot be read|is damaged|has format)"):
            AutoModel.from_pretrained(folder, device="cpu", delete_original=delete)
    assert untouched(precious)


def test_ties_that_the_model_does_not_have_are_refused(split_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(split_llama, tmp_path / "llama")
    shards = folder / "rabbit_shards/float32"

    def forget_the_head(manifest: Any) -> None:
        manifest["shards"] = [row for row in manifest["shards"] if row["name"] != "lm_head"]
        manifest["ties"] = {"lm_head.weight": "model.embed_tokens.weight"}

    edited(shards / "manifest.json", forget_the_head)
    with pytest.raises(errors.MismatchedWeightsError, match=rf"{shards} does not fit LlamaForCausalLM \(lm_head\.weight"):
        AutoModel.from_pretrained(folder, device="cpu")


def test_a_split_whose_manifest_lacks_a_layer_is_mended_by_split(
    own_checkpoint: Any, streamed: Any, plain: Any, ids: Any
) -> None:
    folder = own_checkpoint("llama_tied")
    path = split(folder).folder / "manifest.json"
    for change in (lambda m: m["shards"].pop(), lambda m: m["ties"].clear()):
        edited(path, change)
        with pytest.raises(errors.MismatchedWeightsError, match="does not fit"):
            streamed(folder)
        prepare(folder, SourceConfig(), SplitConfig(mode="always"), progress=False, repair=True)
        with torch.no_grad():
            assert torch.equal(streamed(folder)(ids).logits, plain(folder)(ids).logits)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose split was stopped when one original was deleted; copy it."""
    from rabbit_engine.checkpoints import splitter

    folder, whole, written = families.save("llama", tmp_path_factory.mktemp("interrupted")), splitter.write_shard, []

    def stop(*arguments: Any) -> Any:
        written.append(arguments)
        if len(written) > 4:
            raise InterruptedError
        return whole(*arguments)

    with mock.patch.object(splitter, "write_shard", stop), pytest.raises(InterruptedError):
        split(folder, delete_original=True)
    assert json.loads((folder / "rabbit_shards/float32/journal.json").read_text())["deleted"]
    return folder


JOURNALS: dict[str, Any] = {
    "deleted climbs": lambda j: j.update(deleted=["../outside/precious.txt"]),
    "deleted is no original": lambda j: j.update(deleted=["config.json"]),
    "a tensor's file climbs": lambda j: j["tensors"][0].__setitem__(1, "../outside/precious.txt"),
    "a tensor's dtype": lambda j: j["tensors"][0].__setitem__(2, ["F32"]),
    "a tensor's shape": lambda j: j["tensors"][0].__setitem__(3, [1.5]),
    "a tensor twice": lambda j: j["tensors"].append(j["tensors"][0]),
    "source is null": lambda j: j.update(source=None),
    "shared to a number": lambda j: j.update(shared={"lm_head.weight": 1}),
    "shared that the model does not tie": lambda j: j.update(shared={"lm_head.weight": "model.embed_tokens.weight"}),
    "dropped is a number": lambda j: j.update(dropped=1),
    "version of later": lambda j: j.update(version=9),
}


@pytest.mark.parametrize("fault", list(JOURNALS))
def test_a_journal_of_other_values_is_named(fault: str, interrupted: Path, tmp_path: Path, precious: Path) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "llama")
    edited(folder / "rabbit_shards/float32/journal.json", JOURNALS[fault])
    with pytest.raises(errors.DamagedShardError, match=r"journal\.json"):
        AutoModel.from_pretrained(folder, device="cpu", delete_original=True)
    assert untouched(precious)


def test_a_damaged_shard_whose_original_is_gone_is_named(interrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "llama")
    (folder / "rabbit_shards/float32/model.embed_tokens.safetensors").write_bytes(b"")
    with pytest.raises(errors.DamagedShardError, match=r"embed_tokens\.safetensors is damaged or missing, and so is model-00001"):
        AutoModel.from_pretrained(folder, device="cpu", delete_original=True)


def test_links_are_not_followed_when_originals_are_deleted(own_checkpoint: Any, precious: Path) -> None:
    folder = own_checkpoint("llama")
    for path in folder.glob("*.safetensors"):  # the originals are outside, the folder links to them
        shutil.move(path, precious / f"real-{path.name}")
        path.symlink_to(precious / f"real-{path.name}")
    kept = {path.name: path.stat().st_size for path in precious.iterdir()}
    split(folder, delete_original=True)
    assert {path.name: path.stat().st_size for path in precious.iterdir()} == kept


def test_a_linked_subfolder_is_not_followed_when_originals_are_deleted(own_checkpoint: Any, precious: Path) -> None:
    folder = own_checkpoint("llama")
    (folder / "sub").symlink_to(precious)
    for path in folder.glob("*.safetensors"):
        shutil.move(path, precious / path.name)
    edited(
        folder / "model.safetensors.index.json",
        lambda i: i.update(weight_map={key: f"sub/{name}" for key, name in i["weight_map"].items()}),
    )
    kept = sorted(path.name for path in precious.iterdir())
    with pytest.raises(errors.DamagedCheckpointError, match="nothing outside it is deleted"):
        split(folder, delete_original=True)
    assert sorted(path.name for path in precious.iterdir()) == kept


def test_a_linked_folder_of_shards_is_not_written_through(own_checkpoint: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    theirs = split(families.save("llama", mine)).folder
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    folder = own_checkpoint("llama_biased")
    (folder / "rabbit_shards").symlink_to(mine / "rabbit_shards")
    (theirs / "manifest.json").unlink()
    before.pop("manifest.json")
    with pytest.raises(errors.ShardsNotWritableError, match="is a link to"):
        split(folder)
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before


def test_a_link_in_the_locks_place_is_not_written_through(own_checkpoint: Any, precious: Path) -> None:
    folder = own_checkpoint("llama")
    (folder / "rabbit_shards").mkdir()
    (folder / "rabbit_shards" / ".float32.lock").symlink_to(precious / "precious.txt")
    with pytest.raises(errors.ShardsNotWritableError, match=r"\.float32\.lock is a link to .*precious\.txt"):
        split(folder)
    assert untouched(precious)


def test_a_link_in_a_scratch_files_place_is_not_written_through(own_checkpoint: Any, precious: Path) -> None:
    folder = own_checkpoint("llama")
    shards = folder / "rabbit_shards" / "float32"
    shards.mkdir(parents=True)
    (shards / ".manifest.json.scratch").symlink_to(precious / "precious.txt")
    (shards / "theirs.safetensors").write_text("not a shard of ours")
    split(folder)
    assert untouched(precious)
    assert (shards / "theirs.safetensors").is_file()
