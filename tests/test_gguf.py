"""GGUF files that are cut, changed, or not alone: a named error before any reader believes them."""

from __future__ import annotations

import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rabbit_engine import AutoModel, errors
from rabbit_engine.checkpoints.gguf import read_gguf_header

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tiny llama, two of its matrices in Q8_0."""
    from fuzzing.checkpoints import gguf

    folder = tmp_path_factory.mktemp("gguf")
    gguf(folder)
    return (folder / "model.gguf").read_bytes()


def test_a_whole_file_loads_right(whole: bytes, tmp_path: Path, plain: Any, ids: torch.Tensor) -> None:
    (tmp_path / "model.gguf").write_bytes(whole)
    with torch.no_grad(), AutoModel.from_pretrained(tmp_path / "model.gguf", device="cpu") as model:
        assert torch.equal(model(ids).logits, plain(tmp_path, gguf_file="model.gguf")(ids).logits)


def test_a_file_cut_anywhere_is_named(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for length in [*range(0, 3000, 37), *range(3000, len(whole) - 32, 9973)]:
        path.write_bytes(whole[:length])
        with pytest.raises(errors.DamagedCheckpointError, match=r"model\.gguf (has a damaged GGUF header|is not a GGUF file)"):
            read_gguf_header(path)


def test_no_flipped_bit_of_a_header_makes_the_check_loop_or_fail_otherwise(whole: bytes, tmp_path: Path) -> None:
    path, said, start = tmp_path / "model.gguf", [], time.monotonic()
    for bit in range(0, 8 * 2400, 101):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        try:
            read_gguf_header(path)
        except errors.DamagedCheckpointError as error:
            said.append(str(error))
    assert len(said) > 40
    assert all(str(path) in text for text in said)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize("count", [0xFFFFFFFF, 2**63, 2**20 - 1])
def test_counts_beyond_the_file_are_refused_at_once(at: int, count: int, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
    with pytest.raises(errors.DamagedCheckpointError, match="damaged GGUF header"):
        AutoModel.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("blocks", [0, 1000, 2**31, None])
def test_a_count_of_blocks_that_the_file_does_not_hold_is_refused_at_once(
    blocks: int | None, whole: bytes, tmp_path: Path
) -> None:
    at = whole.index(b"llama.block_count") + len(b"llama.block_count")
    changed = whole.replace(b"block_count", b"block_coinx") if blocks is None else whole
    (tmp_path / "model.gguf").write_bytes(changed[: at + 4] + struct.pack("<I", blocks or 0) + changed[at + 8 :])
    with pytest.raises(errors.DamagedCheckpointError, match=r"model\.gguf .*llama\.block_count' is .* 12 tensors"):
        AutoModel.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("heads", [3, 5, 64, 97])
def test_heads_that_do_not_fit_the_tensors_are_named_by_the_file(heads: int, whole: bytes, tmp_path: Path) -> None:
    at = whole.index(key := b"llama.attention.head_count_kv") + len(key)
    (tmp_path / "model.gguf").write_bytes(whole[: at + 4] + struct.pack("<I", heads) + whole[at + 8 :])
    with pytest.raises(errors.DamagedCheckpointError, match=r"model\.gguf"):
        AutoModel.from_pretrained(tmp_path / "model.gguf", device="cpu")


def test_a_pointer_and_a_big_endian_file_are_recognised(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(errors.DamagedCheckpointError, match=r"model\.gguf is not a GGUF file.*git lfs pull"):
        AutoModel.from_pretrained(path, device="cpu")
    path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    with pytest.raises(errors.DamagedCheckpointError, match="it is big-endian"):
        AutoModel.from_pretrained(path, device="cpu")


def test_a_part_of_a_split_file_says_how_to_join_them(whole: bytes, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"m-0000{number}-of-00003.gguf").write_bytes(whole)
    with pytest.raises(
        errors.DamagedCheckpointError, match=r"one of 3 parts of a model: join them with `llama-gguf-split --merge"
    ):
        AutoModel.from_pretrained(tmp_path / "m-00001-of-00003.gguf", device="cpu")


def test_one_of_several_files_must_be_selected(tmp_path: Path) -> None:
    for name in ("m-Q4_K_M.gguf", "m-Q8_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(errors.CheckpointNotFoundError, match=r"choose with gguf_file=, one of m-Q4_K_M\.gguf, m-Q8_0\.gguf"):
        AutoModel.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(errors.CheckpointNotFoundError, match=r"no m-Q5\.gguf; it has m-Q4_K_M\.gguf, m-Q8_0\.gguf"):
        AutoModel.from_pretrained(tmp_path, device="cpu", gguf_file="m-Q5.gguf")
    with pytest.raises(errors.CheckpointNotFoundError, match=r"m-Q5\.gguf does not exist: .*there: m-Q4_K_M\.gguf, m-Q8_0\.gguf"):
        AutoModel.from_pretrained(tmp_path / "m-Q5.gguf", device="cpu")
