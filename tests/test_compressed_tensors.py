"""Checkpoints of compressed-tensors, streamed as they are stored, against what the package decompresses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import families
import packing
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from conftest import aligned
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rabbit_engine import AutoModel, errors
from rabbit_engine.quantization import ScaledBlocks

SIZES = {"hidden_size": 32, "intermediate_size": 64}
ENDINGS = ("proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "int4 groups": ("pack-quantized", INT4, {}),
    "int4 groups with zero points": ("pack-quantized", {**INT4, "symmetric": False}, {}),
    "int4 outputs": ("pack-quantized", {**INT4, "strategy": "channel", "group_size": None}, {}),
    "int3 groups with zero points": ("pack-quantized", {**INT4, "num_bits": 3, "symmetric": False}, {}),
    "int8 packed": ("pack-quantized", {**INT4, "num_bits": 8}, {}),
    "int8 outputs": ("int-quantized", INT8, TOKENS),
    "int8 outputs with zero points": ("naive-quantized", {**INT8, "symmetric": False}, {}),
    "int8 groups": ("naive-quantized", {**INT4, "num_bits": 8}, {}),
    "fp8 tensor": ("float-quantized", FP8, {**TOKENS, "type": "float"}),
    "fp8 outputs": ("float-quantized", {**FP8, "strategy": "channel"}, {**TOKENS, "type": "float"}),
    "fp8 blocks": ("naive-quantized", {**FP8, "strategy": "block", "block_structure": [16, 16]}, {}),
    "fp8 groups": ("naive-quantized", {**FP8, "strategy": "group", "group_size": 16}, {}),
}


def scheme_of(name: str) -> tuple[str, QuantizationScheme]:
    kind, weights, states = SCHEMES[name]
    of_states = QuantizationArgs(**states) if states else None
    return kind, QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=of_states)


def compress(weight: torch.Tensor, name: str, scale_dtype: torch.dtype | None = None) -> tuple[packing.Tensors, torch.Tensor]:
    """By the package: the tensors that it stores for a weight, and what it decompresses them to."""
    kind, scheme = scheme_of(name)
    low, high = extremes(weight.float(), scheme.weights)
    scale, zero = calculate_qparams(low, high, scheme.weights)
    parts = {"weight": weight, "weight_scale": scale.to(scale_dtype or weight.dtype), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(parts, scheme)
    return {name: tensor.contiguous() for name, tensor in stored.items()}, compressor.decompress(stored, scheme)["weight"]


def extremes(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest value that each scale is for."""
    rows, columns = weight.shape
    tall, wide = {
        "tensor": (rows, columns), "channel": (1, columns), "group": (1, args.group_size), "block": args.block_structure
    }[args.strategy]  # fmt: skip
    blocks = weight.reshape(rows // tall, tall, columns // wide, wide)
    found = blocks.amin((1, 3)), blocks.amax((1, 3))
    return (found[0].view(1), found[1].view(1)) if args.strategy == "tensor" else found


def config_of(name: str) -> dict[str, Any]:
    kind, weights, states = SCHEMES[name]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": states or None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def save(family: str, tmp_path: Path, name: str, scale_dtype: torch.dtype | None = None) -> tuple[Path, Path]:
    """A compressed checkpoint, and one of the weights that it decompresses to."""
    plain = families.save(family, tmp_path / "plain", torch.bfloat16, **SIZES)
    folder = packing.rewrite_quantised(
        plain, tmp_path / "model", lambda weight: compress(weight, name, scale_dtype), config_of(name), ENDINGS
    )
    return folder, plain


@pytest.mark.parametrize("name", SCHEMES)
def test_every_format_has_the_bits_of_the_decompressed_model(
    name: str, tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor
) -> None:
    folder, decompressed = save("llama", tmp_path, name)
    model, whole = streamed(folder), plain(decompressed)
    assert model.plan.streamed
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    steps = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **steps), whole.generate(ids, **steps))


@pytest.mark.parametrize("family", ["phi3", "qwen2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", ["int4 groups with zero points", "fp8 outputs"])
def test_every_family_has_the_bits_of_the_decompressed_model(
    family: str, name: str, tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor
) -> None:
    folder, decompressed = save(family, tmp_path, name)
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, plain(decompressed)(ids).logits)


@pytest.mark.parametrize("name", ["int4 groups", "int8 outputs with zero points", "fp8 tensor"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_scales_of_another_dtype_round_as_the_package_rounds(
    name: str, scale_dtype: torch.dtype, tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor
) -> None:
    folder, decompressed = save("llama", tmp_path, name, scale_dtype)
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, plain(decompressed)(ids).logits)


@pytest.mark.parametrize("name", ["int4 groups", "int8 packed"])
def test_a_checkpoint_has_the_bits_of_transformers_own_load(name: str, tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    folder, _ = save("llama", tmp_path, name)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        whole(ids)  # decompresses
        assert torch.equal(streamed(folder)(ids).logits, aligned(whole)(ids).logits)


def edit(folder: Path, change: Any) -> Path:
    """Change all tensors of a checkpoint, into one file."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_activation_order_gives_each_input_the_scale_of_its_group(
    tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor
) -> None:
    """Inputs of all weights are stored shuffled, with their groups; the plain model's inputs are shuffled alike."""
    folder, decompressed = save("llama", tmp_path, "int4 groups")
    order = {size: torch.randperm(size, generator=torch.Generator().manual_seed(1)) for size in (32, 64)}

    def shuffle(tensors: packing.Tensors) -> None:
        from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

        for key in [key for key in tensors if key.endswith("weight_packed")]:
            size = tensors[key.replace("packed", "shape")]
            values = unpack_from_int32(tensors[key], 4, size)[:, order[int(size[1])]]
            tensors[key] = pack_to_int32(values.contiguous(), 4)
            tensors[key.replace("packed", "g_idx")] = (order[int(size[1])] // 16).to(torch.int32)

    edit(folder, shuffle)
    for path in decompressed.glob("*.safetensors"):
        found = load_file(path)
        save_file({k: t[:, order[t.shape[1]]].contiguous() if k.endswith(ENDINGS) else t for k, t in found.items()}, path)
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, plain(decompressed)(ids).logits)


def test_scales_of_states_and_caches_are_not_used(tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor) -> None:
    folder, decompressed = save("llama", tmp_path, "fp8 tensor")

    def add(tensors: packing.Tensors) -> None:
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
        tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.ones(1)

    with torch.no_grad():
        assert torch.equal(streamed(edit(folder, add))(ids).logits, plain(decompressed)(ids).logits)


def test_groups_of_a_config_may_have_different_formats(tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor) -> None:
    decompressed = families.save("llama", tmp_path / "plain", torch.bfloat16, **SIZES)

    def pack(weight: torch.Tensor) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
        return compress(weight, "fp8 outputs" if weight.shape == (64, 32) else "int4 groups")

    config = config_of("int4 groups")
    group = {**config_of("fp8 outputs")["config_groups"]["group_0"], "format": "float-quantized", "targets": ["re:.*up_proj"]}
    config["config_groups"] = {"group_0": {**config["config_groups"]["group_0"], "format": "pack-quantized"}, "group_1": group}
    folder = packing.rewrite_quantised(decompressed, tmp_path / "model", pack, {**config, "format": "mixed-precision"}, ENDINGS)
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, plain(decompressed)(ids).logits)


def test_a_split_holds_the_decompressed_weights(tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor) -> None:
    folder, decompressed = save("mixtral", tmp_path, "int4 groups with zero points")
    with torch.no_grad():
        assert torch.equal(streamed(folder, split="always")(ids).logits, plain(decompressed)(ids).logits)


@pytest.mark.parametrize("name", ["int4 groups", "int4 groups with zero points", "int4 outputs"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decoder", packing.DECODERS)
def test_packed_values_decode_to_the_bits_of_the_package(
    decoder: str, name: str, dtype: torch.dtype, scales: torch.dtype
) -> None:
    weight = torch.randn(2800, 96, generator=torch.Generator().manual_seed(0)).to(dtype)  # torch operations decode it in pieces
    stored, expected = compress(weight, name, scales)
    zeros = [stored["weight_zero_point"]] if "weight_zero_point" in stored else []
    encoding = ScaledBlocks(4, 1, 96 if name == "int4 outputs" else 16, with_zeros=bool(zeros))
    out = torch.empty(2800, 96, dtype=dtype)
    with packing.DECODERS[decoder]():
        encoding.decode([stored["weight_packed"], stored["weight_scale"], *zeros], out)
    assert torch.equal(out, expected.to(dtype))


def test_the_last_blocks_of_fp8_may_be_smaller(tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor) -> None:
    """24 rows of keys in blocks of 16: two rows of scales do not make blocks of 12."""
    decompressed = families.save("llama", tmp_path / "plain", torch.bfloat16, **{**SIZES, "intermediate_size": 48}, head_dim=12)

    def pack(weight: torch.Tensor) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
        rows, columns = weight.shape
        scale = (
            torch.rand(-(-rows // 16), -(-columns // 16), generator=torch.Generator().manual_seed(rows)) / 100 + 0.001
        ).bfloat16()
        wide = scale.float().repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        values = (weight.float() / wide).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": scale}, (values.float() * wide).bfloat16()

    folder = packing.rewrite_quantised(decompressed, tmp_path / "model", pack, config_of("fp8 blocks"), ENDINGS)
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, plain(decompressed)(ids).logits)


@pytest.mark.parametrize("bits", [3, 6])
def test_words_may_hold_whole_values_as_older_versions_packed_them(bits: int) -> None:
    values = torch.randint(0, 2**bits, (8, 64), generator=torch.Generator().manual_seed(0))
    per_word = 32 // bits
    padded = torch.nn.functional.pad(values, (0, -64 % per_word)).view(8, -1, per_word)
    words = (padded << torch.arange(per_word) * bits).sum(-1).to(torch.int32)
    out, scales = torch.empty(8, 64), torch.rand(8, 4)
    ScaledBlocks(bits, 1, 16, whole=True).decode([words, scales], out)
    assert torch.equal(out, (values - 2 ** (bits - 1)) * scales.repeat_interleave(16, 1))


Q = "model.layers.1.self_attn.q_proj.weight"


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(Q + name)


def put(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({Q + name: value})


ASYMMETRIC = "int4 groups with zero points"
BROKEN = {
    "no scales": ("int4 groups", drop("_scale"), "its weight_scale is not stored"),
    "no scales of fp8": ("fp8 tensor", drop("_scale"), "its weight_scale is not stored"),
    "no values": ("int4 groups", drop("_packed"), "its values are not stored, only "),
    "no zero points": (ASYMMETRIC, drop("_zero_point"), "its weight_zero_point is not stored"),
    "no shape": ("int4 groups", drop("_shape"), "and a weight_shape"),
    "a shape of one number": ("int4 groups", put("_shape", torch.tensor(32)), "holds no two integers"),
    "another shape": ("int4 groups", put("_shape", torch.tensor([32, 48])), r"does not hold \[32, 48\] values of 4 bits"),
    "scales of other groups": ("int4 groups", put("_scale", torch.ones(32, 3).bfloat16()), r"needs \[32, 2\]"),
    "scales of other outputs": ("fp8 outputs", put("_scale", torch.ones(31, 1).bfloat16()), r"needs \[32, 1\]"),
    "scales that are integers": ("int4 groups", put("_scale", torch.ones(32, 2, dtype=torch.uint8)), "only formats that are not"),
    "zero points of others": (
        ASYMMETRIC,
        put("_zero_point", torch.ones(5, 2, dtype=torch.int32)),
        r"weight_zero_point of \[5, 2\]",
    ),
    "groups of other inputs": ("int4 groups", put("_g_idx", torch.ones(31, dtype=torch.int32)), r"a weight_g_idx of \[31\]"),
    "values that are not compressed": ("int8 outputs", put("", torch.ones(32, 32)), "the checkpoint is not compressed"),
    "nvfp4": ("int4 groups", put("_global_scale", torch.ones(1)), "only formats that are not supported"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_tensors_are_named(fault: str, tmp_path: Path) -> None:
    name, break_it, said = BROKEN[fault]
    folder = edit(save("llama", tmp_path, name)[0], break_it)
    with pytest.raises(
        errors.DamagedCheckpointError, match=f"model.safetensors: {Q}, quantised with compressed-tensors, .*{said}"
    ):
        AutoModel.from_pretrained(folder, device="cpu")


def test_a_group_that_does_not_exist_is_named_with_its_weight_and_file(tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    folder = edit(save("llama", tmp_path, "int4 groups")[0], put("_g_idx", torch.full((32,), 2, dtype=torch.int32)))
    model = streamed(folder)
    with pytest.raises(errors.DamagedCheckpointError) as caught, torch.no_grad():
        model(ids)
    assert f"model.safetensors: {Q} cannot be decoded: its g_idx names groups 2 to 2, but there are 2" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "nvfp4-pack-quantized"}, "compressed-tensors in the format nvfp4-pack-quantized is not supported, only pack"),
        (
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed-tensors with sparse-24-bitmask weights is not supported",
        ),
        ({"transform_config": {"config_groups": {"u": {}}}}, "compressed-tensors with a transform_config is not supported"),
        ({"quantization_status": "frozen"}, "quantization_status='frozen'"),
        (
            {"config_groups": [1]},
            r"quantization_config cannot be read: quantization_config.config_groups is \[1\], not an object",
        ),
        ({"config_groups": {"a": {"weights": {"num_bits": "x"}}}}, "weights.num_bits is .'x'"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 0}}}}, "with 4 bits in blocks of .1, 0. is not"),
    ],
)
def test_a_variant_that_is_not_supported_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder, _ = save("llama", tmp_path, "int4 groups")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(errors.CompressionUnavailableError, match=said):
        AutoModel.from_pretrained(folder, device="cpu")
