"""Checkpoints that are quantised as DeepSeek-V3 (FP8) and GPT-OSS (MXFP4) were released: dequantised when they are split."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from rabbit_engine import AutoModel, errors

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


def test_fp8_said_in_the_text_config_is_seen(tmp_path: Path, streamed: Any) -> None:
    folder = rewrite(families.save("qwen2_5_vl", tmp_path / "model", torch.bfloat16), to_fp8, FP8)
    inputs = families.picture("qwen2_5_vl")
    raw = json.loads((folder / "config.json").read_text())
    with torch.no_grad():
        expected = streamed(folder)(**inputs).logits
        raw["text_config"]["quantization_config"] = raw.pop("quantization_config")
        (folder / "config.json").write_text(json.dumps(raw))
        assert torch.equal(streamed(folder)(**inputs).logits, expected)


def test_fp8_that_nobody_explains_is_refused(tmp_path: Path) -> None:
    folder = rewrite(families.save("llama", tmp_path / "model", torch.bfloat16), to_fp8, FP8)
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(errors.CompressionUnavailableError, match="does not say how it is scaled"):
        AutoModel.from_pretrained(folder, device="cpu")


def test_a_quantization_config_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = rewrite(families.save("llama", tmp_path / "model", torch.bfloat16), to_fp8, FP8 | {"weight_block_size": "big"})
    with pytest.raises(errors.CompressionUnavailableError, match="cannot be read"):
        AutoModel.from_pretrained(folder, device="cpu")


def test_mxfp4_is_what_transformers_dequantises(tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    folder = rewrite(families.save("gpt_oss", tmp_path / "model", torch.bfloat16, **sizes), to_mxfp4, MXFP4)
    config = Mxfp4Config(dequantize=True)
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16).eval()
    compare(streamed(folder), whole, families.build("gpt_oss", torch.bfloat16, **sizes), ids)


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
