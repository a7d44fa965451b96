"""GPTQ and AWQ checkpoints, streamed as they are stored, against reference decoders written from the published formulas."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import families
import packing
import pytest
import torch
from safetensors.torch import load_file, save_file

from rabbit_engine import AutoModel, errors
from rabbit_engine.quantization import Awq, Gptq

SIZES = {"hidden_size": 32, "intermediate_size": 64}
GROUP = 16
ENDINGS = ("proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
HEADS = {"llama": {"num_key_value_heads": 4}}
"""Three bits are packed for 32 outputs at a time."""


def groups_of(inputs: int, *, desc_act: bool = False) -> list[int]:
    """The group of each input: in order, or shuffled as activation order stores them."""
    found = [index // GROUP for index in range(inputs)]
    if desc_act:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(3)).tolist()
        found = [found[index] for index in order]
    return found


def save_gptq(
    family: str,
    tmp_path: Path,
    bits: int = 4,
    *,
    desc_act: bool = False,
    less: int = 1,
    endings: tuple[str, ...] = ENDINGS,
) -> tuple[Path, Path]:
    """A checkpoint in GPTQ's format, and one of the weights that it decodes to."""
    plain = families.save(family, tmp_path / "plain", torch.float16, **SIZES, **HEADS.get(family, {}))
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": desc_act, "sym": False}
    config |= {} if less else {"checkpoint_format": "gptq_v2"}

    def pack(weight: torch.Tensor) -> tuple[packing.Tensors, torch.Tensor]:
        return packing.to_gptq(weight, bits, groups_of(weight.shape[1], desc_act=desc_act), less)

    return packing.rewrite_quantised(plain, tmp_path / "model", pack, config, endings), plain


def save_awq(family: str, tmp_path: Path, *, endings: tuple[str, ...] = ENDINGS) -> tuple[Path, Path]:
    """The same in AWQ's."""
    plain = families.save(family, tmp_path / "plain", torch.float16, **SIZES)
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}

    def pack(weight: torch.Tensor) -> tuple[packing.Tensors, torch.Tensor]:
        return packing.to_awq(weight, groups_of(weight.shape[1]))

    return packing.rewrite_quantised(plain, tmp_path / "model", pack, config, endings), plain


def compare(model: Any, whole: Any, ids: torch.Tensor) -> None:
    assert model.plan.streamed
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    steps = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **steps), whole.generate(ids, **steps))


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_has_the_bits_of_the_decoded_model(
    method: str, family: str, tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor
) -> None:
    folder, decoded = save_gptq(family, tmp_path, desc_act=True) if method == "gptq" else save_awq(family, tmp_path)
    compare(streamed(folder), plain(decoded), ids)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_head_that_shares_a_quantised_embedding_stays_in_memory(
    method: str, tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor
) -> None:
    """Rows of these formats cannot be read one by one, so the embedding needs the weight as long as the head does."""
    save = save_gptq if method == "gptq" else save_awq
    folder, decoded = save("llama_tied", tmp_path, endings=(*ENDINGS, "embed_tokens.weight"))
    compare(streamed(folder), plain(decoded), ids)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("less", [0, 1])
def test_every_number_of_bits_has_the_bits_of_the_decoded_model(
    bits: int, less: int, tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor
) -> None:
    folder, decoded = save_gptq("llama", tmp_path, bits, less=less)
    compare(streamed(folder), plain(decoded), ids)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_stored_experts_are_read_one_by_one(method: str, tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed((save_gptq if method == "gptq" else save_awq)("mixtral", tmp_path)[0])
    with torch.no_grad():
        model(ids[:, :1])
    used = sum(layer.routing.used for layer in model.plan.experts.layers)
    assert 0 < sum(found.read for found in model.profile.experts.values()) <= used


def test_a_split_holds_the_decoded_weights(tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor) -> None:
    folder, decoded = save_gptq("llama", tmp_path)
    compare(streamed(folder, split="always"), plain(decoded), ids)


@cache
def large_gptq(bits: int, desc_act: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """A weight that torch operations decode in pieces, what it is stored as, and the decoded one."""
    weight = torch.randn(2752, 96, generator=torch.Generator().manual_seed(bits))
    return weight, *packing.to_gptq(weight, bits, groups_of(96, desc_act=desc_act))


@cache
def large_awq() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same; the last group is half a one."""
    return packing.to_awq(torch.randn(2984, 88, generator=torch.Generator().manual_seed(0)), groups_of(88))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("decoder", packing.DECODERS)
def test_gptq_decodes_to_the_bits_of_its_formula(decoder: str, bits: int, desc_act: bool, dtype: torch.dtype) -> None:
    weight, stored, expected = large_gptq(bits, desc_act)
    tensors = [stored[name] for name in ("qweight", "qzeros", "scales", *(("g_idx",) if desc_act else ()))]
    out = torch.empty(2752, 96, dtype=dtype)
    with packing.DECODERS[decoder]():
        Gptq(bits, GROUP, 1).decode(tensors, out)
    assert torch.equal(out, expected.to(dtype))
    assert (expected.float() - weight).abs().max() < 6 / 2**bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decoder", packing.DECODERS)
def test_awq_decodes_to_the_bits_of_its_formula(decoder: str, dtype: torch.dtype) -> None:
    stored, expected = large_awq()
    out = torch.empty(2984, 88, dtype=dtype)
    with packing.DECODERS[decoder]():
        Awq(GROUP).decode(list(stored.values()), out)
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_and_torch_operations_decode_large_weights_to_the_same_bits(dtype: torch.dtype) -> None:
    """More outputs than a tile, and not a whole number of tiles."""
    generator, outputs, inputs = torch.Generator().manual_seed(0), 528, 352

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)

    scales = torch.rand(inputs // GROUP, outputs, generator=generator).half()
    order = torch.tensor(groups_of(inputs, desc_act=True), dtype=torch.int32)
    made: list[tuple[Any, list[torch.Tensor]]] = [
        (Gptq(bits, GROUP, 1), [words(inputs * bits // 32, outputs), words(inputs // GROUP, outputs * bits // 32), scales, order])
        for bits in (2, 4, 8)
    ]
    made += [(Awq(GROUP), [words(inputs, outputs // 8), words(inputs // GROUP, outputs // 8), scales])]
    for encoding, stored in made:
        found = []
        for decoder in packing.DECODERS.values():
            out = torch.empty(outputs, inputs, dtype=dtype)
            with decoder():
                encoding.decode(stored, out)
            found.append(out)
        assert torch.equal(*found)


Q = "model.layers.1.self_attn.q_proj."


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(Q + name)


def put(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({Q + name: value})


INT = torch.int32
BROKEN = {
    "no values": ("gptq", drop("qweight"), "qweight are not stored"),
    "no scales": ("gptq", drop("scales"), "scales are not stored"),
    "no zero points": ("gptq", drop("qzeros"), "qzeros are not stored"),
    "scales of other outputs": ("gptq", put("scales", torch.ones(2, 31).half()), r"scales of \[2, 31\] .* do not fit 32 outputs"),
    "scales of other groups": ("gptq", put("scales", torch.ones(3, 32).half()), "for 3 groups, 32 inputs in groups of 16 need 2"),
    "values of another dtype": ("gptq", put("qweight", torch.ones(4, 32)), "does not hold values of 4 bits"),
    "zero points of another shape": ("gptq", put("qzeros", torch.ones(2, 3, dtype=INT)), r"qzeros of \[2, 3\]"),
    "groups of other inputs": ("gptq", put("g_idx", torch.ones(31, dtype=INT)), r"a g_idx of \[31\] .* does not fit 32 inputs"),
    "no values of AWQ": ("awq", drop("qweight"), "qweight are not stored"),
    "no scales of AWQ": ("awq", drop("scales"), "scales are not stored"),
    "scales of AWQ for other groups": ("awq", put("scales", torch.ones(3, 32).half()), r"scales of \[3, 32\]"),
    "zero points of AWQ for others": ("awq", put("qzeros", torch.ones(2, 5, dtype=INT)), r"qzeros of \[2, 5\]"),
    "an activation's scales": (
        "awq",
        lambda t: t.update({"model.layers.0.mlp.act.scales": torch.ones(64)}),
        "divide an activation",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_tensors_are_named(fault: str, tmp_path: Path) -> None:
    method, break_it, said = BROKEN[fault]
    folder, _ = (save_gptq if method == "gptq" else save_awq)("llama", tmp_path)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    break_it(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(errors.DamagedCheckpointError, match=f"model.safetensors: .*weight, quantised with {method}, .*{said}"):
        AutoModel.from_pretrained(folder, device="cpu")


def test_activation_order_needs_the_groups_of_inputs(tmp_path: Path) -> None:
    folder, _ = save_gptq("llama", tmp_path, desc_act=True)
    path = next(path for path in folder.glob("*.safetensors") if f"{Q}g_idx" in load_file(path))
    save_file({name: tensor for name, tensor in load_file(path).items() if name != f"{Q}g_idx"}, path)
    with pytest.raises(
        errors.DamagedCheckpointError, match=rf"{path.name}: {Q}weight, .* its g_idx is not stored, and with desc_act"
    ):
        AutoModel.from_pretrained(folder, device="cpu")


def test_a_group_that_does_not_exist_is_named_with_its_weight_and_file(tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    folder, _ = save_gptq("llama", tmp_path)
    path = next(path for path in folder.glob("*.safetensors") if f"{Q}g_idx" in load_file(path))
    save_file({name: t.clamp(min=7) if name == f"{Q}g_idx" else t for name, t in load_file(path).items()}, path)
    model = streamed(folder)
    said = f"{path}: {Q}weight cannot be decoded: its g_idx names groups 7 to 7, but there are 2: download the checkpoint again"
    with pytest.raises(errors.DamagedCheckpointError, match=re.escape(said)), torch.no_grad():
        model(ids)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 5}, "GPTQ with bits=5"),
        ({"group_size": 0}, "group_size=0"),
        ({"checkpoint_format": "marlin"}, "GPTQ in the format 'marlin' is not supported, only gptq and gptq_v2"),
        ({"is_marlin_format": True}, "GPTQ in the format 'marlin'"),
        ({"bits": "four"}, "quantization_config cannot be read: quantization_config.bits is .'four'"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ with version='gemv'"),
        ({"quant_method": "awq", "bits": 8}, "AWQ with version='gemm', backend='auto' and bits=8 is not supported"),
        (
            {"quant_method": "aqlm"},
            "is quantised with aqlm, which is not supported; supported are fp8, mxfp4, bitsandbytes, gptq",
        ),
    ],
)
def test_a_variant_that_is_not_supported_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder, _ = save_gptq("llama", tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(errors.CompressionUnavailableError, match=said):
        AutoModel.from_pretrained(folder, device="cpu")


def test_bits_may_vary_between_layers(tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor) -> None:
    """As GPTQModel's `dynamic` stores them."""
    decoded = families.save("llama", tmp_path / "plain", torch.float16, **SIZES)

    def pack(weight: torch.Tensor) -> tuple[packing.Tensors, torch.Tensor]:
        return packing.to_gptq(weight, 8 if weight.shape[0] == 64 else 4, groups_of(weight.shape[1]))

    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "dynamic": {".*up_proj": {"bits": 8}}}
    folder = packing.rewrite_quantised(decoded, tmp_path / "model", pack, config)
    compare(streamed(folder), plain(decoded), ids)
