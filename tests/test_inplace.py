"""Streaming from the original files: no copy where they hold the weights as the model has them, else a split or a reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from rabbit_engine import errors
from rabbit_engine.model.runtime import runtime_of

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
ORACLES = Path(__file__).parent / "data" / "oracles"


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_plain_checkpoint_is_streamed_in_place(family: str, own_checkpoint: Any, plain: Any, streamed: Any, ids: Any) -> None:
    folder = own_checkpoint(family)
    before = files_of(folder)
    model = streamed(folder, split="never")
    assert runtime_of(model).checkpoint.manifest is None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(folder)(ids).logits)
    assert files_of(folder) == before
    assert runtime_of(streamed(folder)).checkpoint.manifest is None


def test_every_weight_is_aligned_for_the_kernels(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(own_checkpoint("llama_biased"), split="never")
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, *_: seen.extend(p.data_ptr() for p in module.parameters()))
    model(ids)
    assert len(seen) == 3 * 6
    assert all(pointer % 16 == 0 for pointer in seen)


@pytest.mark.parametrize("shift", range(0, 16, 2))
def test_any_offset_in_a_file_is_right(shift: int, own_checkpoint: Any, plain: Any, streamed: Any, ids: Any) -> None:
    folder = own_checkpoint("qwen3")
    expected = plain(folder)(ids).logits
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        pad = (shift - (8 + size)) % 16
        path.write_bytes((size + pad).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * pad + raw[8 + size :])
    for keywords in ({}, {"max_memory": None}):
        with torch.no_grad():
            assert torch.equal(streamed(folder, split="never", **keywords)(ids).logits, expected)


@pytest.mark.parametrize(
    ("family", "keywords", "reason"),
    [
        ("internlm2", {}, "it is converted"),
        ("llama", {"dtype": "bfloat16"}, r"stored as torch\.float32, the model needs torch\.bfloat16"),
        ("mixtral", {"dtype": "bfloat16"}, r"stored as torch\.float32, the model needs torch\.bfloat16"),
    ],
)
def test_a_checkpoint_that_must_be_split_is_split_or_refused(
    family: str, keywords: Any, reason: str, own_checkpoint: Any, streamed: Any, ids: Any, tmp_path: Path
) -> None:
    oracle = ORACLES / family
    folder = Path(shutil.copytree(oracle, tmp_path / family)) if oracle.exists() else own_checkpoint(family)
    with pytest.raises(errors.ConfigurationError, match=rf'split="never", but .* must be split: .*{reason}'):
        streamed(folder, split="never", **keywords)
    assert not (folder / "rabbit_shards").exists()
    model = streamed(folder, **keywords)
    assert runtime_of(model).checkpoint.manifest is not None
    model(ids)


def test_pickles_are_split(own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("llama")
    tensors = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(errors.ConfigurationError, match=r"pytorch_model\.bin is not a safetensors file"):
        streamed(folder, split="never")
    assert runtime_of(streamed(folder)).checkpoint.manifest is not None


def test_a_path_for_shards_asks_for_a_split(own_checkpoint: Any, streamed: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("llama")
    assert streamed(folder, layer_shards_saving_path=tmp_path / "fast").plan.streamed
    assert list((tmp_path / "fast").rglob("manifest.json"))
    assert not (folder / "rabbit_shards").exists()
    with pytest.raises(errors.ConfigurationError, match='split="never" makes no shards'):
        streamed(folder, split="never", delete_original=True)
    with pytest.raises(errors.ConfigurationError, match="split='sometimes' is not one of 'auto', 'always', 'never'"):
        streamed(folder, split="sometimes")


def test_an_existing_split_is_used(own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("llama")
    assert runtime_of(streamed(folder, split="always")).checkpoint.manifest is not None
    assert runtime_of(streamed(folder)).checkpoint.manifest is not None
    assert runtime_of(streamed(folder, split="never")).checkpoint.manifest is None


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_stored_twice(equal: bool, own_checkpoint: Any, plain: Any, streamed: Any, ids: Any) -> None:
    folder = own_checkpoint("llama_tied")
    tensors = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for keywords in ({}, {"max_memory": None}):
        model = streamed(folder, split="never", **keywords)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain(folder)(ids).logits)


def test_a_base_models_names_are_renamed_in_place(own_checkpoint: Any, plain: Any, streamed: Any, ids: Any) -> None:
    folder = own_checkpoint("llama_tied")
    expected = plain(folder)(ids).logits
    tensors = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert torch.equal(streamed(folder, split="never")(ids).logits, expected)


def test_a_file_that_changes_under_a_model_is_an_error(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama")
    model = streamed(folder, split="never", prefetching=False)
    expected = model.generate(ids, **GREEDY)
    victim = runtime_of(model).transfer.units[1].extents[0].path
    whole, times = victim.read_bytes(), victim.stat()
    victim.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(errors.DamagedShardError, match=f"{victim.name} was replaced while in use"):
        model.generate(ids, **GREEDY)
    victim.write_bytes(whole)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_a_missing_file_is_named(own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("llama")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(errors.MissingFileError, match=gone.name):
        streamed(folder)


def test_weights_that_are_missing_are_named(own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("llama")
    index = folder / "model.safetensors.index.json"
    name = "model.layers.1.mlp.up_proj.weight"
    path = folder / json.loads(index.read_text())["weight_map"][name]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(errors.MismatchedWeightsError, match=name.replace(".", r"\.")):
        streamed(folder, split="never")


def test_on_a_file_system_in_memory(own_checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    import tempfile

    folder = own_checkpoint("llama")
    memory = Path("/dev/shm")
    if not memory.is_dir():
        memory = tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        shutil.copytree(folder, Path(scratch) / "llama")
        model = streamed(Path(scratch) / "llama", split="never")
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain(folder)(ids).logits)
        model.close()


@pytest.mark.usefixtures("without_direct_reads")
def test_buffered_reads_are_right_and_reported(own_checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama_biased")
    model = streamed(folder, split="never")
    assert any("page cache" in note and "refuses direct reads (EINVAL)" in note for note in model.plan.notes)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(folder)(ids).logits)
