"""Checkpoints that bitsandbytes quantised, streamed as they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import families
import packing
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from conftest import aligned
from safetensors.torch import load_file, save_file
from shared_passes import assert_same_texts
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rabbit_engine import AutoModel, errors
from rabbit_engine.quantization import Blocks4bit, Int8Rows

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Whole blocks in each row: bitsandbytes' kernel for CPUs decodes others wrongly."""

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4, double quantisation": {**NF4, "bnb_4bit_use_double_quant": True},
    "fp4, computed in float32": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "nf4, stored as bfloat16": {**NF4, "bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_compute_dtype": torch.float16},
    "int8": {"load_in_8bit": True},
    "int8, few outliers": {"load_in_8bit": True, "llm_int8_threshold": 1.0},
}


def save(family: str, folder: Path, scheme: str, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Path:
    """A checkpoint that transformers quantised with bitsandbytes and saved."""
    plain = families.save(family, folder / "plain", dtype, **{**SIZES, **sizes})
    config = BitsAndBytesConfig(**SCHEMES[scheme])
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=dtype, device_map={"": "cpu"})
    model.save_pretrained(folder / "model", max_shard_size="60KB")
    return folder / "model"


def load(folder: Path, device: str = "cpu") -> Any:
    """transformers' own model on a device, with 4-bit weights in the layout of the file, as where a CPU has no other."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}).eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_checkpoint_has_the_bits_of_transformers_with_bitsandbytes(
    family: str, scheme: str, tmp_path: Path, streamed: Any, ids: torch.Tensor
) -> None:
    folder = save(family, tmp_path, scheme, **({"head_dim": None} if family == "qwen2" else {}))
    model, whole = streamed(folder), load(folder)
    assert model.plan.streamed
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    steps = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **steps), whole.generate(ids, **steps))


def test_transposing_layers_become_linear_ones_as_in_transformers(tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    sizes = {"n_embd": 64, "hidden_size": None, "head_dim": None, "intermediate_size": None}
    folder = save("gpt2", tmp_path, "nf4, double quantisation", **sizes)
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, load(folder)(ids).logits)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_state_space_calls_its_quantised_layer_as_in_transformers(
    scheme: str, tmp_path: Path, streamed: Any, ids: torch.Tensor
) -> None:
    """Otherwise its code multiplies by the layer's weight itself."""
    folder = save("jamba", tmp_path, scheme, head_dim=None)
    with torch.no_grad():
        assert torch.equal(streamed(folder)(ids).logits, load(folder)(ids).logits)


@pytest.fixture
def quantised_experts(tmp_path: Path) -> Callable[[str], tuple[Path, Any]]:
    """`quantised_experts(kind)`: a Mixtral whose experts are quantised one by one, as older versions of transformers saved it,
    and the model that it was made from with the values that its experts decode to."""

    def make(kind: str) -> tuple[Path, Any]:
        folder = families.save("mixtral", tmp_path / kind, torch.bfloat16, hidden_size=64, intermediate_size=64)
        decoded = {}
        for path in folder.glob("*.safetensors"):
            tensors = {}
            for name, tensor in load_file(path).items():
                stored, decoded[name] = quantise(name, tensor, kind) if ".experts." in name else ({name: tensor}, tensor)
                tensors.update(stored)
            save_file(tensors, path)
        index = folder / "model.safetensors.index.json"
        weight_map = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        save_file(decoded, (tmp_path / "decoded.safetensors"))
        raw = json.loads((folder / "config.json").read_text())
        plain = families.save("mixtral", tmp_path / "plain", torch.bfloat16, hidden_size=64, intermediate_size=64)
        for path in plain.glob("*.safetensors"):
            save_file({name: decoded[name] for name in load_file(path)}, path)
        config = {"quant_method": "bitsandbytes", "load_in_4bit": kind != "int8", "load_in_8bit": kind == "int8"}
        (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
        return folder, aligned(AutoModelForCausalLM.from_pretrained(plain).eval())

    return make


def quantise(name: str, tensor: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """By bitsandbytes: the tensors that it stores, and what it decodes them to."""
    if kind == "int8":
        values, largest, _ = int8_vectorwise_quant(tensor.half())
        stored = {name: values, f"{name.removesuffix('weight')}SCB": largest}
        return stored, int8_vectorwise_dequant(values, largest).to(tensor.dtype)
    packed, state = quantize_4bit(tensor, quant_type=kind, compress_statistics=True)
    parts = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    return {name: packed, **parts}, dequantize_4bit(packed, state)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_experts_are_decoded_one_by_one(kind: str, quantised_experts: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder, whole = quantised_experts(kind)
    model = streamed(folder)
    with torch.no_grad():
        model(ids[:, :1])
        used = sum(layer.routing.used for layer in model.plan.experts.layers)
        assert 0 < sum(found.read for found in model.profile.experts.values()) <= used
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_a_split_holds_the_decoded_weights(quantised_experts: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder, whole = quantised_experts("nf4")
    model = streamed(folder, split="always")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["rabbit_shards"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_a_split_may_delete_originals_only_when_no_part_of_a_weight_is_needed(tmp_path: Path, streamed: Any, ids: Any) -> None:
    """The codes of all weights in one file, their scales in another."""
    folder = save("llama", tmp_path, "nf4")
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    files = {name: "model-1.safetensors" if "absmax" in name else "model-2.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with torch.no_grad():
        expected = streamed(folder, split="always")(ids).logits
        assert torch.equal(streamed(folder, split="always", delete_original=True)(ids).logits, expected)
    assert not list(folder.glob("*.safetensors"))


def test_adapters_apply_to_quantised_layers(tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    import peft

    for scheme in ("nf4", "int8"):
        folder = save("llama", tmp_path / scheme, scheme)
        model, whole = streamed(folder), load(folder)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        made = peft.get_peft_model(load(folder), config)
        made.save_pretrained(tmp_path / scheme / "adapter")
        for each in (model, whole):
            each.load_adapter(str(tmp_path / scheme / "adapter"))
        with torch.no_grad():
            found, expected, without = (each(ids).logits.float() for each in (model, whole, streamed(folder)))
        difference = (found - expected).abs().max()
        assert difference <= 0.01 * expected.abs().max()  # PEFT's layer for bitsandbytes rounds the adapter's part first
        assert difference < (found - without).abs().max() / 10


def test_texts_of_a_session_are_those_of_transformers(tmp_path: Path, streamed: Any) -> None:
    folder = save("llama", tmp_path, "int8")
    assert_same_texts(streamed(folder), load(folder))


def test_every_budget_streams_stored_bytes(tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    folder = save("llama", tmp_path, "fp4, computed in float32")
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with torch.no_grad():
        expected = load(folder)(ids).logits
        for budget in (None, "700KB", "1GB"):
            model = streamed(folder) if budget is None else streamed(folder, max_memory={"cpu": budget})
            assert torch.equal(model(ids).logits, expected)
            assert model.plan.weights_bytes < 1.3 * files or model.plan.pass_bytes == 0  # in whole pages, or decoded once
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("decoder", packing.DECODERS)
def test_blocks_decode_to_the_bits_of_bitsandbytes(decoder: str, kind: str, block: int, dtype: torch.dtype, twice: bool) -> None:
    weight = torch.randn(1100, 256, generator=torch.Generator().manual_seed(0)).to(dtype)  # torch operations decode it in pieces
    codes, state = quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=twice)
    stored = [codes, state.absmax, *([state.state2.absmax, state.state2.code] if twice else [])]
    out = torch.empty(1100, 256, dtype=dtype)
    encoding = Blocks4bit(kind, block, state.offset.item() if twice else None)
    with packing.DECODERS[decoder]():
        encoding.decode(stored, out)
    expected = dequantize_4bit(codes, state)
    assert torch.equal(out, expected)
    expected += 0.0  # fp4's code 8 is 0 in its table and in its AVX512 kernel, -0 in the other one
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("decoder", packing.DECODERS)
def test_a_block_may_span_rows_and_the_last_be_short(decoder: str) -> None:
    """As bitsandbytes computes on a GPU; its kernel for CPUs is wrong for such shapes."""
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight.view(-1), blocksize=64, quant_type="nf4", compress_statistics=False)
    out = torch.empty(3, 50)
    with packing.DECODERS[decoder]():
        Blocks4bit("nf4", 64).decode([codes, state.absmax], out)
    values = get_4bit_type("nf4", device="cpu")
    pairs = [(int(byte) >> 4, int(byte) & 15) for byte in codes.view(-1)]
    expected = [values[code] * state.absmax[index // 64] for index, code in enumerate(code for pair in pairs for code in pair)]
    assert out.view(-1).tolist() == torch.stack(expected).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_rows_decode_to_the_bits_of_bitsandbytes(dtype: torch.dtype) -> None:
    values, largest, _ = int8_vectorwise_quant(torch.randn(2800, 96, generator=torch.Generator().manual_seed(0)).half())
    out = torch.empty(2800, 96, dtype=dtype)
    Int8Rows().decode([values, largest], out)
    assert torch.equal(out, int8_vectorwise_dequant(values, largest).to(dtype))


Q = "model.layers.1.self_attn.q_proj.weight"


def with_state(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    name = f"{Q}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist())) | changes
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


BROKEN: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no scales": ("nf4", lambda t: t.pop(f"{Q}.absmax"), "need a weight.quant_state and a weight.absmax"),
    "too few scales": (
        "nf4",
        lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][1:].clone()}),
        "absmax is 63 values .* needs 64",
    ),
    "scales of another dtype": ("nf4", lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"].half()}), "64 values of float16"),
    "no map": ("nf4, double quantisation", lambda t: t.pop(f"{Q}.nested_quant_map"), "its map is missing"),
    "no state": ("nf4", lambda t: t.pop(f"{Q}.quant_state.bitsandbytes__nf4"), "need a weight.quant_state"),
    "a state that is no JSON": (
        "nf4",
        lambda t: t[f"{Q}.quant_state.bitsandbytes__nf4"].fill_(7),
        "its weight.quant_state is damaged: Expecting value",
    ),
    "a state that is huge": (
        "nf4",
        lambda t: t.update({f"{Q}.quant_state.bitsandbytes__nf4": torch.full((70_000,), 32, dtype=torch.uint8)}),
        "it has 70000 bytes, more than a description needs",
    ),
    "a state of another type": ("nf4", lambda t: with_state(t, quant_type="fp4"), "quant_type is 'fp4', its name says nf4"),
    "a state of another shape": ("nf4", lambda t: with_state(t, shape=[64, 63]), r"2048 bytes hold 4096 values, .* \[64, 63\]"),
    "a shape of another rank": ("nf4", lambda t: with_state(t, shape=[4096]), r"shape is \[4096\], not that of a matrix"),
    "another block size": ("nf4", lambda t: with_state(t, blocksize=63), "blocksize is 63, none of 32, 64"),
    "an infinite offset": ("nf4, double quantisation", lambda t: with_state(t, nested_offset="many"), "nested_offset 'many'"),
    "a truncated block": ("nf4", lambda t: t.update({Q: t[Q][:-1].clone()}), "2047 bytes hold 4094 values"),
    "no rows' scales": ("int8", lambda t: t.pop(Q.replace("weight", "SCB")), "it is int8, and its SCB is not stored"),
    "scales of other rows": ("int8", lambda t: t.update({Q.replace("weight", "SCB"): torch.ones(3)}), r"have an SCB of \[3\]"),
    "a tiled layout": (
        "int8",
        lambda t: t.update({f"{Q}_format": torch.tensor(2, dtype=torch.uint8)}),
        "its weight_format is 2; only 0, rows",
    ),
    "no values": ("int8", lambda t: t.pop(Q), "only its largest, layout are stored"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """`saved(scheme)` is one Llama's folder, made once; do not change it."""
    made: dict[str, Path] = {}

    def folder(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = save("llama", tmp_path_factory.mktemp("saved"), scheme)
        return made[scheme]

    return folder


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_tensors_are_named(fault: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    scheme, break_it, said = BROKEN[fault]
    tensors = {name: tensor for path in saved(scheme).glob("*.safetensors") for name, tensor in load_file(path).items()}
    break_it(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved(scheme) / "config.json").read_bytes())
    with pytest.raises(errors.DamagedCheckpointError, match=f"model.safetensors: {Q}, quantised with bitsandbytes, .*{said}"):
        AutoModel.from_pretrained(tmp_path, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bnb_4bit_compute_dtype": "float8"}, "bnb_4bit_compute_dtype is 'float8', supported are float32"),
        ({"llm_int8_threshold": "high"}, "llm_int8_threshold is 'high', not a number from 0"),
    ],
)
def test_an_invalid_config_is_named(changes: dict[str, Any], said: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    for path in saved("nf4").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"].update(changes)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(errors.CompressionUnavailableError, match=said):
        AutoModel.from_pretrained(tmp_path, device="cpu")


def test_verify_and_plan_know_quantised_checkpoints(saved: Callable[[str], Path], rabbit: Any) -> None:
    assert rabbit("verify", "--record", saved("nf4")).code == 0
    assert rabbit("verify", saved("nf4")).code == 0
    done = rabbit("plan", saved("int8"), "--max-memory", "cpu=1GB")
    assert done.code == 0
    assert "streamed from the original files" in done.out
