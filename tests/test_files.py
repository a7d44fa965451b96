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

import families
import pytest
import torch
from editing import edited
from safetensors.torch import save_file

from rabbit_engine import AutoModel, errors
from rabbit_engine.checkpoints.formats import PickleFile
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.storage.directio import claim_memory
from rabbit_engine.storage.tensorfiles import read_header


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


def test_memory_that_the_system_refuses_is_a_budget_error() -> None:
    with pytest.raises(errors.BudgetError, match="the system refuses"):
        claim_memory(2**62)
