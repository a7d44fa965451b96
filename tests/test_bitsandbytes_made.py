"""BitsAndBytesConfig: quantised once by bitsandbytes itself, and computed as transformers computes with it in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import families
import pytest
import torch
from conftest import aligned
from test_quantised import FP8, rewrite, to_fp8
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rabbit_engine import errors
from rabbit_engine.config import BitsAndBytes, CompressionConfig, SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.planning.forecast import forecast
from rabbit_engine.quantization.bitsandbytes_made import MadeBlocks4bit, MadeInt8Rows, PackedBlocks4bit
from rabbit_engine.quantization.storable import Storable
from rabbit_engine.transformers_bridge.quantizers import bitsandbytes_layers

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4 twice": {**NF4, "bnb_4bit_use_double_quant": True},
    "fp4 in float32": {"load_in_4bit": True},
    "nf4 stored as bfloat16": {**NF4, "bnb_4bit_quant_storage": torch.bfloat16},
    "nf4 of some": {**NF4, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
    "int8": {"load_in_8bit": True},
    "int8 with few outliers": {"load_in_8bit": True, "llm_int8_threshold": 1.0},
}


def whole_of(folder: Path, scheme: dict[str, Any], device: str = "cpu") -> Any:
    """transformers' own model, quantised on a device: without a map, bitsandbytes would take a GPU."""
    config = BitsAndBytesConfig(**scheme)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": device}).eval()
    return aligned_but_quantised(model)


def aligned_but_quantised(model: Any) -> Any:
    plain = torch.nn.ModuleList(module for module in model.modules() if type(module) in (torch.nn.Linear, torch.nn.Embedding))
    aligned(plain)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama_biased", "qwen3"])
def test_logits_and_tokens_are_those_of_transformers_with_bitsandbytes(
    family: str, scheme: str, tmp_path: Path, streamed: Any, ids: torch.Tensor
) -> None:
    folder = families.save(family, tmp_path / family, torch.bfloat16, **SIZES)
    model, whole = streamed(folder, quantization_config=BitsAndBytesConfig(**SCHEMES[scheme])), whole_of(folder, SCHEMES[scheme])
    assert model.plan.streamed
    assert model.config.quantization_config.to_dict() == whole.config.quantization_config.to_dict()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
        assert torch.equal(model(ids[:, :1]).logits, whole(ids[:, :1]).logits)
    steps = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(4)
    expected = whole.generate(ids, **steps)
    torch.manual_seed(4)
    assert torch.equal(model.generate(ids, **steps), expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma2", "opt"])
def test_other_families_are_quantised_as_transformers_does(family: str, tmp_path: Path, streamed: Any, ids: Any) -> None:
    sizes = {
        "mixtral": {"hidden_size": 64},
        "gpt2": {"n_embd": 64, "hidden_size": 64},
        "gemma2": SIZES,
        "opt": {**SIZES, "word_embed_proj_dim": 64, "ffn_dim": 64},
    }
    folder = families.save(family, tmp_path / family, torch.bfloat16, **sizes[family])
    model, whole = streamed(folder, quantization_config=BitsAndBytesConfig(**NF4)), whole_of(folder, NF4)
    quantised = {name for name, module in whole.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert quantised
    assert {name for name, entry in model._checkpoint.entries.items() if entry.is_encoded} == {f"{n}.weight" for n in quantised}
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("skip", [None, ["lm_head"], ["layers.0", "up_proj"]])
@pytest.mark.parametrize("family", ["llama_tied", "qwen3_moe", "gpt2", "opt"])
def test_the_layers_are_those_that_transformers_replaces(family: str, skip: Any, tmp_path: Path) -> None:
    folder = families.save(family, tmp_path / family)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    expected = [name for name, module in whole.named_modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)]
    assert bitsandbytes_layers(AutoModelForCausalLM.from_pretrained(folder), skip) == expected


@pytest.mark.parametrize(("keyword", "made"), [("load_in_4bit", "bnb-fp4"), ("load_in_8bit", "bnb-int8")])
def test_older_keywords_are_short_for_a_config(keyword: str, made: str, own_checkpoint: Any, streamed: Any, ids: Any) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16, **SIZES)
    model = streamed(folder, **{keyword: True})
    again = streamed(folder, quantization_config=BitsAndBytesConfig(**{keyword: True}))
    assert [path.name for path in folder.glob("rabbit_shards/[!.]*")] == [f"bfloat16-{made}"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_layers_keep_their_computation_if_the_shards_exist(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    """What a config says of the computation alone does not split again."""
    folder = own_checkpoint("llama", dtype=torch.bfloat16, **SIZES)
    streamed(folder, quantization_config=BitsAndBytesConfig(**NF4))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("rabbit_shards/*/*")}
    scheme = {**NF4, "bnb_4bit_compute_dtype": torch.float32}
    model = streamed(folder, quantization_config=BitsAndBytesConfig(**scheme))
    whole = whole_of(folder, scheme)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("rabbit_shards/*/*")} == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("encoding", [MadeBlocks4bit("nf4", 64), PackedBlocks4bit("fp4"), MadeInt8Rows()], ids=str)
def test_weights_decode_to_what_bitsandbytes_dequantises(encoding: Storable) -> None:
    weight = (torch.randn(64, 128, generator=torch.Generator().manual_seed(3)) * 0.02).bfloat16()
    out = torch.empty_like(weight)
    encoding.decode(encoding.compress(weight), out)
    if isinstance(encoding, MadeInt8Rows):
        values, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        expected = bitsandbytes.functional.int8_vectorwise_dequant(values, largest).to(torch.bfloat16)
    else:
        expected = bitsandbytes.functional.dequantize_4bit(
            *bitsandbytes.functional.quantize_4bit(weight, quant_type=encoding.kind)
        )
    assert torch.equal(out, expected)


def test_a_forecast_tells_of_the_quantised_bytes(own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    plain = forecast(folder, SourceConfig(), SplitConfig(), StreamConfig(device=torch.device("cpu"), device_budget_bytes=2**24))
    for kind in ("nf4", "int8"):
        split = SplitConfig(compression=CompressionConfig(method="bnb", bitsandbytes=BitsAndBytes(kind=kind)))
        with pytest.raises(errors.BudgetError) as too_small:
            forecast(folder, SourceConfig(), split, StreamConfig(device=torch.device("cpu"), device_budget_bytes=1))
        smallest = StreamConfig(device=torch.device("cpu"), device_budget_bytes=too_small.value.smallest_bytes)  # none is decoded
        assert forecast(folder, SourceConfig(), split, smallest).weights_bytes < plain.weights_bytes * 0.8


def test_a_config_that_quantises_nothing_is_refused(streamed: Any) -> None:
    with pytest.raises(errors.CompressionUnavailableError, match="leaves weights as they are"):
        streamed("anything", quantization_config=BitsAndBytesConfig())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type='nf5' is not 'nf4' or 'fp4'"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float64}, "bnb_4bit_compute_dtype=float64 is not supported"),
        ({"load_in_8bit": True, "llm_int8_threshold": float("nan")}, "llm_int8_threshold=nan is not a number from 0"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1.0}, "llm_int8_threshold=-1.0 is not a number from 0"),
    ],
)
def test_values_that_bitsandbytes_does_not_have_are_refused_before_anything_is_split(
    options: dict[str, Any], said: str, streamed: Any
) -> None:
    with pytest.raises(errors.ConfigurationError, match=said):
        streamed("anything", quantization_config=BitsAndBytesConfig(**options))


def test_a_checkpoint_that_is_quantised_already_is_not_quantised_again(tmp_path: Path, streamed: Any) -> None:
    folder = rewrite(families.save("llama", tmp_path / "model", torch.bfloat16), to_fp8, FP8)
    with pytest.raises(errors.CompressionUnavailableError, match="is quantised with fp8 already"):
        streamed(folder, load_in_4bit=True)
