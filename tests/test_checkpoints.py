"""A checkpoint from anywhere: every format gives the same weights, every fault its own error."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from editing import edited
from safetensors.torch import load_file, save_file

from rabbit_engine import AutoModel, errors
from rabbit_engine.checkpoints import prepare
from rabbit_engine.config import SourceConfig, SplitConfig


def as_bins(folder: Path, count: int) -> Path:
    """The checkpoint's weights as `count` PyTorch pickles."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if count == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    parts = [dict(list(tensors.items())[i::count]) for i in range(count)]
    names = [f"pytorch_model-{i + 1:05}-of-{count:05}.bin" for i in range(count)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def one_file(folder: Path) -> Path:
    families.build("llama").save_pretrained(folder, max_shard_size="1GB")
    return folder


FORMATS = {
    "sharded safetensors": lambda folder: families.save("llama", folder),
    "one safetensors": one_file,
    "one bin": lambda folder: as_bins(families.save("llama", folder), 1),
    "sharded bins": lambda folder: as_bins(families.save("llama", folder), 3),
}


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("delete_original", [False, True])
def test_every_format_gives_the_same_logits(
    kind: str, delete_original: bool, tmp_path: Path, plain: Any, streamed: Any, ids: Any
) -> None:
    folder = FORMATS[kind](tmp_path)
    with torch.no_grad():
        expected = plain(folder)(ids).logits
        assert torch.equal(streamed(folder, delete_original=delete_original)(ids).logits, expected)
        assert torch.equal(streamed(folder)(ids).logits, expected)
    left = [p for pattern in ("*.safetensors", "*.bin") for p in folder.glob(pattern)]
    assert (left == []) is delete_original


def test_old_pickle_that_cannot_be_mapped(tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = as_bins(families.save("llama", tmp_path), 1)
    path = folder / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, plain(folder)(ids).logits)


def test_pickle_that_stores_both_tied_weights(tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = as_bins(families.save("llama_tied", tmp_path), 1)
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path)
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, path)
    model = streamed(folder, max_memory=None)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    untied, whole = streamed(folder), plain(folder)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(untied(ids).logits, whole(ids).logits)


def test_only_the_head_of_a_tied_pair_is_stored(tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = as_bins(families.save("llama_tied", tmp_path), 1)
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    torch.save(tensors, path)
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, plain(folder)(ids).logits)


def test_dtype_is_the_checkpoints_own(tmp_path: Path, plain: Any, streamed: Any) -> None:
    folder = families.save("llama", tmp_path, dtype=torch.bfloat16)
    assert streamed(folder).dtype == plain(folder).dtype == torch.bfloat16
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("dtype")
    (folder / "config.json").write_text(json.dumps(raw))
    assert streamed(folder).dtype == plain(folder).dtype == torch.bfloat16
    assert streamed(folder, torch_dtype="float16").dtype == torch.float16


def test_gguf_alone_in_a_folder_or_named(smollm: Path, tmp_path: Path) -> None:
    from rabbit_engine.checkpoints.formats import find_weight_files, only_gguf

    assert only_gguf(["a.gguf", "README.md"]) == "a.gguf"
    assert only_gguf(["a.gguf", "b.gguf"]) is None
    assert only_gguf(["a.gguf", "model.safetensors"]) is None
    with pytest.raises(errors.CheckpointNotFoundError, match=r"gguf_file=, one of a\.gguf, b\.gguf"):
        find_weight_files(["a.gguf", "b.gguf"], str, None, "here")
    with pytest.raises(errors.CheckpointNotFoundError, match=r"no c\.gguf"):
        find_weight_files(["a.gguf"], str, "c.gguf", "here")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "cut off": (
        lambda d: cut(d / "model-00002-of-00003.safetensors"),
        errors.DamagedCheckpointError,
        r"00002-of-00003\.safetensors is truncated",
    ),
    "empty": (
        lambda d: (d / "model-00002-of-00003.safetensors").write_bytes(b""),
        errors.DamagedCheckpointError,
        "00002-of-00003.safetensors is not a complete safetensors file",
    ),
    "no header": (
        lambda d: (d / "model-00001-of-00003.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{not js}" + bytes(99)),
        errors.DamagedCheckpointError,
        "00001-of-00003.safetensors has a damaged safetensors header",
    ),
    "a web page": (
        lambda d: (d / "model-00001-of-00003.safetensors").write_text("<!DOCTYPE html><html>log in</html>" * 9),
        errors.DamagedCheckpointError,
        "00001-of-00003.safetensors is not a complete safetensors file",
    ),
    "file missing": (
        lambda d: (d / "model-00003-of-00003.safetensors").unlink(),
        errors.MissingFileError,
        "00003-of-00003.safetensors is missing, model.safetensors.index.json lists it",
    ),
    "bad index": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        errors.DamagedCheckpointError,
        "model.safetensors.index.json cannot be read",
    ),
    "index that climbs": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        errors.DamagedCheckpointError,
        "names files outside",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), errors.CheckpointNotFoundError, "no config.json"),
    "no weights": (
        lambda d: [p.unlink() for p in d.glob("model*")],
        errors.CheckpointNotFoundError,
        r"has none of model\.safetensors, ",
    ),
    "unknown model": (
        lambda d: (d / "config.json").write_text('{"model_type": "no_such_model"}'),
        errors.UnsupportedArchitectureError,
        "not an architecture that the installed transformers builds",
    ),
    "no causal model": (
        lambda d: (d / "config.json").write_text('{"model_type": "clip"}'),
        errors.UnsupportedArchitectureError,
        "no such class",
    ),
    "quantised": (
        lambda d: edit_config(d, quantization_config={"quant_method": "hqq", "bits": 4}),
        errors.CompressionUnavailableError,
        r"is quantised with hqq, which is not supported; supported are fp8, mxfp4, bitsandbytes",
    ),
    "other shapes": (
        lambda d: edit_config(d, intermediate_size=64),
        errors.MismatchedWeightsError,
        r"gate_proj.weight is \[48, 32\]",
    ),
    "more layers": (
        lambda d: edit_config(d, num_hidden_layers=4),
        errors.MismatchedWeightsError,
        r"lacks weights.*model\.layers\.3",
    ),
}


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


@pytest.mark.parametrize("fault", list(FAULTS))
def test_fault_names_the_file_and_what_to_do(fault: str, own_checkpoint: Any, streamed: Any) -> None:
    change, error, words = FAULTS[fault]
    folder = own_checkpoint("llama")
    change(folder)
    with pytest.raises(error, match=words):
        streamed(folder)
    assert list(folder.rglob("manifest.json")) == []


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/rabbit-evil"),))


def test_a_pickle_with_more_than_tensors_is_not_loaded(own_checkpoint: Any, streamed: Any) -> None:
    folder = as_bins(own_checkpoint("llama"), 1)
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
        with pytest.raises(errors.UnsafePickleError, match=r"pytorch_model\.bin contains more than tensors"):
            streamed(folder)
    assert not Path("/tmp/rabbit-evil").exists()


def test_damaged_pickle(own_checkpoint: Any, streamed: Any) -> None:
    folder = as_bins(own_checkpoint("llama"), 1)
    whole = (folder / "pytorch_model.bin").read_bytes()
    for raw in (whole[:-3000], b"", b"<html>", whole[:50]):
        (folder / "pytorch_model.bin").write_bytes(raw)
        with pytest.raises(errors.DamagedCheckpointError, match=r"pytorch_model\.bin"):
            streamed(folder)


def test_adapter_folder_says_how_to_load_it(tmp_path: Path, streamed: Any) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(errors.CheckpointNotFoundError, match="is an adapter: load its base model"):
        streamed(tmp_path)


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "a/b/c", "~/nothing-here"])
def test_a_path_that_is_not_there(name: str, streamed: Any) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match="does not exist"):
        streamed(name)


def test_checkpoint_without_a_tokenizer_runs(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"))
    model.generate(ids, max_new_tokens=2)
    with pytest.raises(errors.TokenizerNotFoundError, match="the model itself runs"):
        model.tokenizer  # noqa: B018
    model.tokenizer = "my own"
    assert model.tokenizer == "my own"


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "my_llama"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_remote_code_runs_only_when_allowed(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama")
    (folder / "modeling_my.py").write_text(REMOTE_CODE)
    before = streamed(folder)(ids).logits
    auto_map = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyModel"}
    edit_config(folder, model_type="my_llama", auto_map=auto_map)
    with pytest.raises(errors.UnsupportedArchitectureError, match="trust_remote_code=True"):
        streamed(folder)
    model = streamed(folder, trust_remote_code=True)
    assert type(model).__name__ == "MyModel"
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("family", "wrong"), [("llama_wide_heads", 8), ("qwen3", 4), ("phi3", 14), ("mistral", 14), ("glm", 14), ("gemma2", 8)]
)
def test_head_dim_of_the_checkpoint_is_right(
    family: str, wrong: int, own_checkpoint: Any, plain: Any, streamed: Any, ids: Any
) -> None:
    folder = own_checkpoint(family)
    with torch.no_grad():
        expected = plain(folder)(ids).logits
        edit_config(folder, head_dim=wrong)
        model = streamed(folder)
        assert torch.equal(model(ids).logits, expected)
        model.close()
        assert torch.equal(streamed(folder)(ids).logits, expected)


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
