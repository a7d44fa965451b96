"""Weight files that somebody else wrote, and disks that fail: a named error that says which file, or the right answer."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from rabbit_engine import AutoModel, errors
from rabbit_engine.checkpoints import prepare
from rabbit_engine.checkpoints.formats import PickleFile
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.storage.directio import claim_memory
from rabbit_engine.storage.tensorfiles import read_header


def split(folder: Path, **keywords: Any) -> Any:
    return prepare(folder, SourceConfig(), SplitConfig(mode="always", **keywords), progress=False)


def edited(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def header_edited(path: Path, change: Callable[[Any], object] | None = None, text: bytes | None = None) -> None:
    """Change the header of a safetensors file, or put another text in its place."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + size])
    if change is not None:
        change(table)
    text = json.dumps(table).encode() if text is None else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


NORM = "model.norm.weight"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"

HEADERS: dict[str, Any] = {
    "shape of floats": lambda t: t[NORM].update(shape=[32.0]),
    "a shape that is true": lambda t: t[NORM].update(shape=[True, 32]),
    "negative shape": lambda t: t[NORM].update(shape=[-1, -32]),
    "a shape that is text": lambda t: t[NORM].update(shape="32"),
    "offsets of floats": lambda t: t[NORM].update(data_offsets=[float(x) for x in t[NORM]["data_offsets"]]),
    "three offsets": lambda t: t[NORM].update(data_offsets=[*t[NORM]["data_offsets"], 9]),
    "offsets beyond the file": lambda t: t[NORM].update(data_offsets=[x + 2**40 for x in t[NORM]["data_offsets"]]),
    "overlapping": lambda t: t[NORM].update(data_offsets=[x - 4 for x in t[NORM]["data_offsets"]]),
    "unknown dtype": lambda t: t[NORM].update(dtype="F31"),
    "a dtype that is a list": lambda t: t[NORM].update(dtype=["F32"]),
    "no dtype": lambda t: t[NORM].pop("dtype"),
    "a row that is null": lambda t: t.update({NORM: None}),
    "metadata of numbers": lambda t: t.update(__metadata__={"format": 1}),
    "metadata that is a list": lambda t: t.update(__metadata__=["pt"]),
    "more elements than can be counted": lambda t: t.update(x={"dtype": "F32", "shape": [2**62, 4, 0], "data_offsets": [0, 0]}),
}


@pytest.mark.parametrize("fault", list(HEADERS))
def test_a_header_that_does_not_add_up_is_named(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({NORM: torch.ones(32), "b": torch.ones(8, 4)}, path)
    header_edited(path, HEADERS[fault])
    with pytest.raises(errors.DamagedFileError, match=r"model\.safetensors has a damaged safetensors header: .*download it"):
        read_header(path)


@pytest.mark.parametrize("text", [b"[]", b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1, "a": 1}', b"null"])
def test_a_header_that_is_not_a_table_is_named(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({NORM: torch.ones(32)}, path)
    header_edited(path, text=text)
    with pytest.raises(errors.DamagedFileError, match=r"model\.safetensors has a damaged safetensors header"):
        read_header(path)


def test_metadata_may_be_empty_text(tmp_path: Path) -> None:
    save_file({NORM: torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt", "title": ""})
    header = read_header(tmp_path / "model.safetensors")
    assert header.metadata == {"format": "pt", "title": ""}
    assert [entry.shape for entry in header.tensors] == [(2,)]


def test_a_wrong_file_in_place_of_weights_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for raw, words in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
        (b"<html>" * 9, "web page"),
    ):
        path.write_bytes(raw)
        with pytest.raises(errors.DamagedFileError, match=words):
            read_header(path)


INDEXES: dict[str, Any] = {
    "a file that is a number": lambda i: i["weight_map"].update({NORM: 3}),
    "a file that is null": lambda i: i["weight_map"].update({NORM: None}),
    "no weight_map": lambda i: i.pop("weight_map"),
    "weight_map is a list": lambda i: i.update(weight_map=["model.safetensors"]),
    "weight_map is empty": lambda i: i.update(weight_map={}),
    "metadata is text": lambda i: i.update(metadata="x"),
    "dtype is a number": lambda i: i.update(metadata={"dtype": 16}),
    "absolute": lambda i: i["weight_map"].update({NORM: "/etc/passwd"}),
    "climbs": lambda i: i["weight_map"].update({NORM: "sub/../../x.safetensors"}),
    "climbs on Windows": lambda i: i["weight_map"].update({NORM: "..\\x.safetensors"}),
    "a drive of Windows": lambda i: i["weight_map"].update({NORM: "C:x.safetensors"}),
    "a name too long": lambda i: i["weight_map"].update({NORM: "x" * 300}),
    "a name with a zero byte": lambda i: i["weight_map"].update({NORM: "a\0b"}),
}


@pytest.mark.parametrize("fault", list(INDEXES))
def test_an_index_of_other_values_is_named(fault: str, own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    edited(folder / "model.safetensors.index.json", INDEXES[fault])
    with pytest.raises(errors.DamagedCheckpointError, match=r"model\.safetensors\.index\.json"):
        AutoModel.from_pretrained(folder, device="cpu")


def test_an_index_that_misplaces_tensors_loads_as_in_transformers(
    own_checkpoint: Any, plain: Any, streamed: Any, ids: Any
) -> None:
    folder = own_checkpoint("llama")

    def swap(index: Any) -> None:
        names = sorted(set(index["weight_map"].values()))
        index["weight_map"] = {key: names[number % len(names)] for number, key in enumerate(index["weight_map"])}

    edited(folder / "model.safetensors.index.json", swap)
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, plain(folder)(ids).logits)


PICKLES: dict[str, tuple[Any, str]] = {
    "a key that is a number": (lambda s: {**s, 7: s[NORM]}, "holds an item named 7"),
    "a key that is a tuple": (lambda s: {**s, ("a", 1): s[NORM]}, "holds an item named"),
    "a list": (lambda s: list(s.values()), "holds a list"),
    "a tensor": (lambda s: s[NORM], "holds a Tensor"),
    "a value that is a number": (lambda s: {**s, NORM: 1.5}, rf"lacks weights.*{NORM}"),
    "on the meta device": (lambda s: {**s, NORM: s[NORM].to("meta")}, "not its values"),
    "sparse": (lambda s: {**s, "lm_head.weight": s["lm_head.weight"].to_sparse()}, "lm_head.weight as torch.sparse_coo"),
    "complex of 128 bits": (lambda s: {**s, NORM: s[NORM].to(torch.complex128)}, "as torch.complex128"),
}


@pytest.mark.parametrize("fault", list(PICKLES))
def test_a_pickle_of_other_things_is_named(fault: str, checkpoint: Any, tmp_path: Path) -> None:
    change, words = PICKLES[fault]
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    torch.save(change(families.build("llama").state_dict()), tmp_path / "pytorch_model.bin")
    with pytest.raises(errors.CheckpointError, match=words) as caught:
        AutoModel.from_pretrained(tmp_path, device="cpu")
    assert str(tmp_path) in str(caught.value)


def test_a_pickle_cut_anywhere_is_named(checkpoint: Any, tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(families.build("llama").state_dict(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 25):
        path.write_bytes(whole[:length])
        with pytest.raises(errors.DamagedCheckpointError, match=r"pytorch_model\.bin is not a complete PyTorch file"):
            AutoModel.from_pretrained(tmp_path, device="cpu")
    path.write_bytes(LFS_POINTER)
    with pytest.raises(errors.DamagedCheckpointError, match="git lfs pull"):
        AutoModel.from_pretrained(tmp_path, device="cpu")


def test_a_pickle_whose_directory_points_elsewhere_is_named(tmp_path: Path) -> None:
    """A map is read at the offsets in the zip's directory, whatever is there."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(1000.0), "b": torch.arange(1000.0) + 1}, path)
    whole = bytearray(path.read_bytes())
    directory = [place for place in range(len(whole)) if whole[place : place + 4] == b"PK\1\2"]
    assert len(directory) > 4
    for record in directory:
        damaged = bytearray(whole)
        damaged[record + 42] ^= 64  # of the offset of the member's header
        path.write_bytes(damaged)
        with pytest.raises(errors.DamagedCheckpointError, match=r"pytorch_model\.bin is not a complete PyTorch file"):
            PickleFile(path).read("a")
    path.write_bytes(whole)
    assert torch.equal(PickleFile(path).read("b"), torch.arange(1000.0) + 1)


def test_a_pickle_that_is_cut_while_it_is_read_kills_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    weights = {"a": torch.randn(100_000), "b": torch.randn(8, 4).t()}
    torch.save(weights, path)
    file = PickleFile(path)
    for name, tensor in weights.items():
        assert torch.equal(file.read(name), tensor)
    os.truncate(path, 4096)  # a map of it now ends the process with SIGBUS
    with pytest.raises(errors.DamagedCheckpointError, match=r"pytorch_model\.bin was replaced while in use"):
        file.read("a")
    file.release()
    with pytest.raises(errors.DamagedCheckpointError, match=r"pytorch_model\.bin was replaced while in use"):
        file.read("a")


# Nothing outside of the model's own folder is deleted or written.


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


# Disks.


@pytest.mark.parametrize("place", ["folder", "pipe", "gone"])
def test_something_else_in_a_files_place_while_in_use(place: str, own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama")
    model = streamed(folder, split="never", prefetching=False)
    victim = runtime_of(model).transfer.units[1].extents[0].path
    kept = victim.with_suffix(".kept")
    victim.rename(kept)
    if place == "folder":
        victim.mkdir()
    elif place == "pipe":
        os.mkfifo(victim)
    with pytest.raises((errors.UnreadableFileError, errors.MissingFileError, errors.DamagedShardError), match=victim.name):
        model(ids)
    if victim.exists():
        victim.rmdir() if place == "folder" else victim.unlink()
    kept.rename(victim)
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EACCES])
def test_a_read_error_of_the_disk_is_named(
    number: int, own_checkpoint: Any, streamed: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_checkpoint("llama")
    model = streamed(folder, split="never", prefetching=False)
    with torch.no_grad():
        expected = model(ids).logits

    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(io, "FileIO", Failing)
        with pytest.raises(
            errors.UnreadableFileError, match=rf"safetensors cannot be read \({errno.errorcode[number]}, "
        ) as caught:
            model(ids)
    assert isinstance(caught.value, OSError)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_an_interrupted_read_resumes(
    own_checkpoint: Any, streamed: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_checkpoint("llama")
    model = streamed(folder, split="never")
    with torch.no_grad():
        expected = model(ids).logits
    interruptions: list[int] = []

    class Interrupted(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            interruptions.append(1)
            if len(interruptions) % 2:
                raise InterruptedError
            return super().readinto(memoryview(buffer)[: 4096 * (1 + len(interruptions) % 3)])  # and short

    monkeypatch.setattr(io, "FileIO", Interrupted)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert len(interruptions) > 10


def test_a_disk_that_fails_a_write_is_named(own_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_checkpoint("llama")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(errors.ShardsNotWritableError, match=r"journal\.json cannot be written \(Input/output error\)"):
        split(folder)


def test_memory_that_the_system_refuses_is_a_budget_error() -> None:
    with pytest.raises(errors.BudgetError, match="the system refuses"):
        claim_memory(2**62)


# A config without dtype.


def mixed(state: dict[str, torch.Tensor], wide: str) -> dict[str, torch.Tensor]:
    """bfloat16, but for names with `wide` in them."""
    return {key: tensor.float() if wide in key else tensor.bfloat16() for key, tensor in state.items()}


@pytest.mark.parametrize("form", ["safetensors", "sharded", "sharded, dtype in the index", "bin"])
def test_a_config_without_dtype_has_the_dtype_that_transformers_finds(form: str, own_checkpoint: Any, plain: Any) -> None:
    folder = own_checkpoint("llama")
    edited(folder / "config.json", lambda c: c.pop("dtype"))
    files = {path: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    if "index" in form:
        edited(folder / "model.safetensors.index.json", lambda i: i["metadata"].update(dtype="float16"))
    if form in ("safetensors", "bin"):
        for path in folder.glob("model*"):
            path.unlink()
        # stored in an order that is neither that of the names nor the model's
        files = {
            folder / "model.safetensors": {key: files[path][key] for path in files for key in sorted(files[path], reverse=True)}
        }
    found = set()
    for wide in ("norm", "embed", "lm_head", "layers.0", "no weight", "mlp"):
        for path, state in files.items():
            if form == "bin":
                torch.save(mixed(state, wide), folder / "pytorch_model.bin")
            else:
                save_file(mixed(state, wide), path, {"format": "pt"})
        dtype = prepare(folder, SourceConfig(), SplitConfig(), progress=False).dtype
        assert dtype == plain(folder).dtype
        found.add(dtype)
    assert found == {torch.float16} if "index" in form else {torch.float32, torch.bfloat16}


def test_mixed_dtypes_without_one_in_the_config_give_transformers_logits(
    own_checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    folder = own_checkpoint("llama")
    edited(folder / "config.json", lambda c: c.pop("dtype"))
    for path in folder.glob("*.safetensors"):
        save_file(mixed(load_file(path), "norm"), path, {"format": "pt"})
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, plain(folder)(ids).logits)


def test_integers_first_and_no_dtype_ask_for_one(own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    edited(folder / "config.json", lambda c: c.pop("dtype"))
    for path in folder.glob("*.safetensors"):
        save_file({key: tensor.to(torch.int32) for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(errors.ConfigurationError, match=r"first weights are torch\.int32: pass dtype="):
        AutoModel.from_pretrained(folder, device="cpu")
