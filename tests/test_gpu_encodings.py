"""On a CUDA device: weights in every stored form, decoded there, answer as the decoded weights do on the same device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import families
import gguf_files
import pytest
import test_bitsandbytes
import test_bitsandbytes_made as made
import test_compressed_tensors
import torch
from test_compression import with_decoded_weights
from test_gptq_awq import save_awq, save_gptq
from test_gpu import GREEDY, from_disk, logits_are_those_of
from test_lossless import WIDE
from transformers import BitsAndBytesConfig

from rabbit_engine.quantization.four_bit import FourBitGroups
from rabbit_engine.quantization.four_bit_layouts import LAYOUTS

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from benchmark_decoding import ENCODINGS, storable

DECODED_HERE = {**ENCODINGS, **{f"4bit, {layout}": storable(FourBitGroups(32, layout)) for layout in LAYOUTS}}
pytestmark = pytest.mark.gpu
OF_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3moe", "qwen2moe")
PACKED: dict[str, Callable[[str, Path], tuple[Path, Path]]] = {
    **{f"gptq of {bits} bits": partial(save_gptq, bits=bits) for bits in (2, 3, 4, 8)},
    "gptq by activations": partial(save_gptq, desc_act=True),
    "awq": save_awq,
    **{name: partial(test_compressed_tensors.save, name=name) for name in test_compressed_tensors.SCHEMES},
}
WITH_EXPERTS = ("gptq by activations", "awq", "int4 groups with zero points", "fp8 outputs")


def dtype_for(family: str, half: torch.dtype = torch.bfloat16) -> torch.dtype:
    """float32 where experts' sums are in another order: their rounding is small enough there to tell it from a mistake."""
    return torch.float32 if family in OF_EXPERTS else half


def load(streamed: Any, path: Path, **keywords: Any) -> Any:
    """In the smallest device memory, from disk."""
    model = streamed(path, device="cuda", max_memory=from_disk(path, **keywords), **keywords)
    assert model.plan.pass_bytes > 0
    return model


def answers_are_those_of(whole: Any, model: Any, ids: torch.Tensor) -> None:
    whole = whole.to("cuda")
    for some in (ids, ids[:, :1]):
        logits_are_those_of(whole, model, {"input_ids": some})
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids.cuda(), **GREEDY))


def similarity(model: Any, whole: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        found, expected = (logits.float().flatten() for logits in (model(ids).logits, whole(ids.cuda()).logits))
    return float(torch.nn.functional.cosine_similarity(found, expected, dim=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", DECODED_HERE)
def test_every_encoding_decodes_to_the_bits_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    if name == "lossless" and dtype != torch.bfloat16:
        pytest.skip("it is for bfloat16")
    torch.manual_seed(0)
    stored = DECODED_HERE[name](512, 512)
    expected, out = (torch.empty(stored.shape, dtype=dtype, device=device) for device in ("cpu", "cuda"))
    stored.encoding.decode(stored.components, expected)
    stored.encoding.decode([component.cuda() for component in stored.components], out)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("name", DECODED_HERE)
def test_large_weights_are_decoded_in_pieces_within_the_memory_that_plans_count(name: str) -> None:
    stored = DECODED_HERE[name](4096, 2560)
    components, out = [part.cuda() for part in stored.components], torch.empty(stored.shape, dtype=torch.bfloat16, device="cuda")
    stored.encoding.decode(components, out)  # makes tables
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stored.encoding.decode(components, out)
    found = torch.cuda.max_memory_allocated() - before
    assert found <= stored.encoding.work_bytes(components, out, out.device) + 2**20
    expected = torch.empty(stored.shape, dtype=torch.bfloat16)
    stored.encoding.decode(stored.components, expected)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "Q4_K"), ("qwen2", "Q3_K"), ("gemma3", "Q6_K"), ("gpt2", "Q5_K"), ("qwen3moe", "Q8_0"), ("qwen2moe", "Q4_1")],
)
@pytest.mark.parametrize("fused", [None, True])
def test_gguf_files_are_as_in_transformers(
    architecture: str, kind: str, fused: bool | None, tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    path, dtype = gguf_files.write(tmp_path / "m.gguf", architecture, kind), dtype_for(architecture)
    model = load(streamed, path, dtype=dtype, fused_products=fused)
    assert model.plan.decoding.nbytes > 0
    answers_are_those_of(plain(tmp_path, gguf_file="m.gguf", dtype=dtype), model, ids)


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "llama") for name in PACKED), *((name, "mixtral") for name in WITH_EXPERTS)]
)
def test_packed_checkpoints_are_the_decoded_ones(
    name: str, family: str, tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    folder, decoded = PACKED[name](family, tmp_path)
    keywords = {"dtype": torch.float32} if family in OF_EXPERTS else {}
    model = load(streamed, folder, **keywords)
    assert bool(model.plan.experts.layers) == (family in OF_EXPERTS)
    answers_are_those_of(plain(decoded, **keywords), model, ids)


@pytest.mark.parametrize("scheme", test_bitsandbytes.SCHEMES)
def test_checkpoints_of_bitsandbytes_are_as_in_transformers(
    scheme: str, tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    """Its product with four bits rounds otherwise than the decoded weights do; with eight bits it is the same operation."""
    folder = test_bitsandbytes.save("llama", tmp_path, scheme)
    model, whole = load(streamed, folder), test_bitsandbytes.load(folder, "cuda")
    assert whole.device.type == "cuda"
    assert similarity(model, whole, ids) > 0.999
    if scheme.startswith("int8"):
        answers_are_those_of(whole, model, ids)
    elif "float" not in scheme:  # computed in the model's dtype
        answers_are_those_of(with_decoded_weights(model, plain(tmp_path / "plain")), model, ids)


@pytest.mark.parametrize("scheme", made.SCHEMES)
def test_bitsandbytes_configs_quantise_as_in_transformers(
    scheme: str, tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    """A split quantises on the CPU, transformers on the device: a value in the middle of two codes may get the other."""
    folder = families.save("llama_biased", tmp_path / "model", torch.bfloat16, **made.SIZES)
    model = load(streamed, folder, quantization_config=BitsAndBytesConfig(**made.SCHEMES[scheme]))
    assert similarity(model, made.whole_of(folder, made.SCHEMES[scheme], "cuda"), ids) > 0.999
    if made.SCHEMES[scheme].get("bnb_4bit_compute_dtype") == torch.bfloat16:
        answers_are_those_of(with_decoded_weights(model, plain(folder)), model, ids)


@pytest.mark.parametrize("family", ["llama_tied", "llama_biased", "gemma3", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("method", ["4bit", "8bit"])
@pytest.mark.parametrize("fused", [None, True])
def test_compressed_models_are_transformers_with_the_decoded_weights(
    family: str, method: str, fused: bool | None, tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    folder = families.save(family, tmp_path / "model", dtype_for(family), hidden_size=64)
    keywords = {"compression": method, "fused_products": fused}
    model = load(streamed, folder, **keywords)
    answers_are_those_of(with_decoded_weights(model, plain(folder)), model, ids)
    if family == "llama_tied":  # and where all of it stays on the device, packed
        resident = streamed(folder, device="cuda", max_memory=None, **keywords)
        assert not resident.plan.streamed
        answers_are_those_of(with_decoded_weights(model, plain(folder)), resident, ids)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3_moe", "gpt_oss"])
def test_lossless_splits_are_the_original_models(
    family: str, tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rabbit_engine.model.loading.why_lossless_gains_nothing", lambda *_: "")
    folder = families.save(family, tmp_path / "model", torch.bfloat16, **WIDE)
    model, whole = load(streamed, folder, compression="lossless"), plain(folder).to("cuda")
    assert any(entry.is_encoded for entry in model._checkpoint.entries.values())
    if family in OF_EXPERTS:
        assert similarity(model, whole, ids) > 0.9995
    else:
        answers_are_those_of(whole, model, ids)
