"""Checkpoints that are quantised as DeepSeek-V3 (FP8) and GPT-OSS (MXFP4) were released: streamed as they are stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import smallest
from interrupting import interrupt_at
from safetensors.torch import load_file, save_file
from shared_passes import assert_same_texts
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from rabbit_engine import AutoModel, errors
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.streaming.binding import scratch

BLOCK = 8
MXFP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def rewrite(
    folder: Path, change: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]], quantization: dict[str, Any]
) -> Path:
    """Change the tensors of a checkpoint, and say in its config how they are quantised."""
    files = {}
    for path in folder.glob("*.safetensors"):
        tensors = {new: made for name, tensor in load_file(path).items() for new, made in change(name, tensor).items()}
        save_file(tensors, path)
        files.update(dict.fromkeys(tensors, path.name))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    return folder


def to_fp8(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Blocks of BLOCK x BLOCK, each with its scale, as DeepSeek-V3 stores its projections."""
    if not name.endswith("proj.weight") or any(size % BLOCK for size in tensor.shape):
        return {name: tensor}
    rows, columns = tensor.shape
    blocks = tensor.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    stored = (blocks / scale).reshape(rows, columns).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scale[:, 0, :, 0].contiguous()}


def to_mxfp4(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Blocks of 32 four-bit values along the input, each with an exponent, as GPT-OSS stores its experts."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}
    values = tensor.float().transpose(-1, -2)  # [experts, out, in]
    blocks = values.reshape(*values.shape[:-1], values.shape[-1] // 32, 32)
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - 2
    scaled = blocks / torch.exp2(exponent)
    codes = (scaled.abs()[..., None] - MXFP4_VALUES).abs().argmin(-1) | torch.where(scaled < 0, 8, 0)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return {f"{name}_blocks": packed.contiguous(), f"{name}_scales": (exponent[..., 0] + 127).to(torch.uint8).contiguous()}


FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def to_smaller_blocks(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Blocks of 16 x 16; those at the ends of sizes that are no multiples are smaller."""
    if not name.endswith(("proj.weight", "proj_with_mqa.weight")):
        return {name: tensor}
    rows, columns = tensor.shape
    scales = torch.rand(-(-rows // 16), -(-columns // 16), generator=torch.Generator().manual_seed(rows)) / 100 + 0.001
    return {name: (tensor.float() / spread(scales, tensor)).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def spread(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return scales.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]


@pytest.mark.parametrize("keywords", [{}, {"split": "always"}, {"compression": "8bit", "fused_products": False}], ids=str)
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("deepseek_v3", {"kv_lora_rank": 32}),  # as in its release: 40 rows
        ("llama", {"hidden_size": 48, "intermediate_size": 40, "num_key_value_heads": 3}),  # 24 rows, which are two equal blocks
    ],
)
def test_the_last_blocks_of_fp8_may_be_smaller(
    family: str, sizes: dict[str, int], keywords: dict[str, Any], tmp_path: Path, streamed: Any, ids: torch.Tensor
) -> None:
    heads = {"num_attention_heads": 6} if family == "llama" else {}
    plain = families.save(family, tmp_path / "plain", torch.bfloat16, **sizes, **heads)
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    rewrite(folder, to_smaller_blocks, {**FP8, "weight_block_size": [16, 16]})
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}

    def decode(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        scales = stored.get(f"{name}_scale_inv")
        return {name: tensor if scales is None else (stored[name].float() * spread(scales, tensor)).bfloat16()}

    for path in plain.glob("*.safetensors"):
        made = {new: back for name, tensor in load_file(path).items() for new, back in decode(name, tensor).items()}
        save_file(made, path, metadata={"format": "pt"})
    with torch.no_grad():
        expected = streamed(plain, **keywords)(ids).logits
        assert torch.equal(streamed(folder, **keywords)(ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_moe"])
def test_fp8_is_what_transformers_dequantises(family: str, tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    folder = rewrite(families.save(family, tmp_path / "model", torch.bfloat16), to_fp8, FP8)
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK))
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16).eval()
    compare(streamed(folder), whole, families.build(family, torch.bfloat16), ids)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fp8_in_another_dtype_is_all_of_that_dtype(dtype: str, tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    folder = rewrite(families.save("llama", tmp_path / "model", torch.bfloat16), to_fp8, FP8)
    model = streamed(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    with torch.no_grad():
        reference = streamed(folder)(ids).logits.float()
        assert torch.nn.functional.cosine_similarity(model(ids).logits.float().flatten(), reference.flatten(), dim=0) > 0.999


def test_fp8_of_unreadable_blocks_is_named(tmp_path: Path, streamed: Any) -> None:
    folder = rewrite(families.save("llama", tmp_path / "model", torch.bfloat16), to_fp8, {**FP8, "weight_block_size": 1})
    with pytest.raises(errors.CompressionUnavailableError, match=r"config\.json: quantization_config cannot be read"):
        streamed(folder)


def test_fp8_in_the_text_config_is_recognised(tmp_path: Path, streamed: Any) -> None:
    folder = rewrite(families.save("qwen2_5_vl", tmp_path / "model", torch.bfloat16), to_fp8, FP8)
    inputs = families.picture("qwen2_5_vl")
    raw = json.loads((folder / "config.json").read_text())
    with torch.no_grad():
        expected = streamed(folder)(**inputs).logits
        raw["text_config"]["quantization_config"] = raw.pop("quantization_config")
        (folder / "config.json").write_text(json.dumps(raw))
        assert torch.equal(streamed(folder)(**inputs).logits, expected)


def test_fp8_without_a_config_is_refused(tmp_path: Path) -> None:
    folder = rewrite(families.save("llama", tmp_path / "model", torch.bfloat16), to_fp8, FP8)
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(errors.CompressionUnavailableError, match="no quantization_config that defines its scale"):
        AutoModel.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("keywords", [{}, {"split": "always"}, {"compression": "8bit"}], ids=str)
def test_missing_scales_of_fp8_are_named(family: str, keywords: dict[str, Any], tmp_path: Path) -> None:
    folder = rewrite(families.save(family, tmp_path / "model", torch.bfloat16), to_fp8, FP8)
    name = "model.layers.2.mlp.experts.3.up_proj.weight" if family == "qwen3_moe" else "model.layers.1.mlp.up_proj.weight"
    path = next(path for path in folder.glob("*.safetensors") if f"{name}_scale_inv" in load_file(path))
    save_file({key: tensor for key, tensor in load_file(path).items() if key != f"{name}_scale_inv"}, path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(index.read_text().replace(f'"{name}_scale_inv": "{path.name}", ', ""))
    with pytest.raises(
        errors.DamagedCheckpointError, match=rf"safetensors: {name} is stored in .*e4m3fn, but its scales are not"
    ):
        AutoModel.from_pretrained(folder, device="cpu", **keywords)


def test_an_unreadable_quantization_config_is_a_rabbit_error(tmp_path: Path) -> None:
    folder = rewrite(families.save("llama", tmp_path / "model", torch.bfloat16), to_fp8, FP8 | {"weight_block_size": "big"})
    with pytest.raises(errors.CompressionUnavailableError, match="cannot be read"):
        AutoModel.from_pretrained(folder, device="cpu")


def test_mxfp4_is_what_transformers_dequantises(tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    folder = rewrite(families.save("gpt_oss", tmp_path / "model", torch.bfloat16, **sizes), to_mxfp4, MXFP4)
    config = Mxfp4Config(dequantize=True)
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16).eval()
    compare(streamed(folder), whole, families.build("gpt_oss", torch.bfloat16, **sizes), ids)


def quantised(family: str, folder: Path, **changes: int) -> tuple[Path, Any]:
    """A checkpoint of the family, and transformers' own model of it, dequantised."""
    if family == "gpt_oss":
        sizes = {"hidden_size": 64, "intermediate_size": 64}
        rewrite(families.save(family, folder, torch.bfloat16, **sizes), to_mxfp4, MXFP4)
        config: Any = Mxfp4Config(dequantize=True)
    else:
        rewrite(families.save(family, folder, torch.bfloat16, **changes), to_fp8, FP8)
        config = FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK))
    return folder, AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_any_budget_streams_stored_bytes_with_the_bits_of_transformers(
    family: str, tmp_path: Path, streamed: Any, ids: torch.Tensor
) -> None:
    """From the smallest, where all moves, through one where some stays as it is stored, to where all is decoded at load."""
    folder, whole = quantised(family, tmp_path / "model")
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with torch.no_grad():
        expected = whole(ids).logits
    least = int(smallest(folder)["cpu"])
    passes = []
    for budget in (least, least + files // 3, least + 2 * files // 3, 10 * least):
        model = streamed(folder, max_memory={"cpu": budget})
        passes.append(model.plan.pass_bytes)
        assert model.plan.device_bytes <= budget
        assert sum(unit.weight_bytes for unit in runtime_of(model).transfer.units) < files
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []  # nothing is split
    assert passes == sorted(passes, reverse=True)
    assert passes[0] > 0
    assert passes[-1] == 0


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_stored_experts_are_read_one_by_one(family: str, tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    folder, _ = quantised(family, tmp_path / "model")
    model = streamed(folder)
    assert model.plan.experts.layers
    with torch.no_grad():
        model(ids[:, :1])
    used = sum(layer.routing.used for layer in model.plan.experts.layers)
    assert 0 < sum(found.read for found in model.profile.experts.values()) <= used


def test_texts_of_a_session_share_decoded_units(tmp_path: Path, streamed: Any) -> None:
    folder, whole = quantised("deepseek_v3", tmp_path / "model")
    assert_same_texts(streamed(folder), whole)


def test_an_interrupted_pass_leaves_no_wrong_weight(tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    folder, whole = quantised("llama", tmp_path / "model")
    model = streamed(folder)
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        handle.remove()
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_an_interrupt_at_any_line_of_decoding_leaves_room_for_other_experts(tmp_path: Path, streamed: Any, ids: Any) -> None:
    folder, whole = quantised("gpt_oss", tmp_path / "model", num_hidden_layers=1)
    model = streamed(folder)
    with torch.no_grad():
        expected = whole(ids).logits
        for line in range(1, 14):
            assert interrupt_at(line, lambda: model(ids), scratch.__file__)
            assert torch.equal(model(ids).logits, expected), line


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_close_frees_memory_that_weights_were_decoded_to(family: str, tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(quantised(family, tmp_path / "model")[0])
    memory = StorageWeakRef(runtime_of(model).ring.view(0, 1).untyped_storage())
    model(ids)
    assert not memory.expired()
    model.close()
    assert memory.expired()


def test_an_unloaded_weight_raises_its_name_even_if_resident(tmp_path: Path, streamed: Any) -> None:
    """If it stays encoded, there are no decoded bytes to compute with."""
    folder, _ = quantised("llama", tmp_path / "model", num_hidden_layers=12, hidden_size=64)
    least = int(smallest(folder)["cpu"])
    for budget in range(least, 2 * least, 4096):
        model = streamed(folder, max_memory={"cpu": budget})
        kept = [unit.name for unit in model.plan.units if unit.scratch_bytes and unit.name in model.plan.resident]
        if kept:
            break
    assert model.plan.streamed  # else all of them were decoded when they were loaded
    with pytest.raises(errors.WeightNotLoadedError, match=kept[0].replace(".", r"\.")):
        next(iter(model.get_submodule(kept[0]).parameters())) + 1


def compare(model: Any, whole: Any, original: Any, ids: torch.Tensor) -> None:
    """Equal to transformers, and near the model that was quantised: the test's own packing is right."""
    assert model.plan.streamed
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, whole(ids).logits)
        assert (
            torch.nn.functional.cosine_similarity(logits.flatten().float(), original(ids).logits.flatten().float(), dim=0) > 0.9
        )
    steps = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **steps), whole.generate(ids, **steps))
