"""The table of encodings in COMPATIBILITY.md: tiny checkpoints in each, in the smallest budget, against their reference.

`make encodings` records what ran.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import families
import gguf_files
import pytest
import test_bitsandbytes
import test_bitsandbytes_made
import test_compressed_tensors
import test_compression
import test_gptq_awq
import test_quantised
import torch
from conftest import aligned
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


class Made(NamedTuple):
    """A checkpoint, the whole model that it must equal, and how it is loaded."""

    path: Path
    whole: Callable[[Any], Any]
    """Of the streamed model, whose weights it may take."""
    keywords: dict[str, Any]


DECODED = "transformers with the decoded weights"
WIDE = {"hidden_size": 256, "intermediate_size": 256}


def whole_model(folder: Path, **keywords: Any) -> Any:
    return aligned(AutoModelForCausalLM.from_pretrained(folder, **keywords).eval())


def in_place(path: Path, whole: Any, **keywords: Any) -> Made:
    return Made(path, lambda _: whole, keywords)


def transformers_dequantises(family: str, folder: Path) -> Made:
    return in_place(*test_quantised.quantised(family, folder))


def transformers_with_bitsandbytes(scheme: str, family: str, folder: Path) -> Made:
    heads = {"head_dim": None} if family in ("qwen2", "phi3") else {}
    saved = test_bitsandbytes.save(family, folder, scheme, **heads)
    return in_place(saved, test_bitsandbytes.load(saved))


def decoded(save: Callable[[str, Path], tuple[Path, Path]], family: str, folder: Path) -> Made:
    saved, plain = save(family, folder)
    return in_place(saved, whole_model(plain))


def compressed(name: str) -> Callable[[str, Path], Made]:
    return partial(decoded, lambda family, folder: test_compressed_tensors.save(family, folder, name))


def gptq(bits: int, *, desc_act: bool = False, less: int = 1) -> Callable[[str, Path], Made]:
    return partial(decoded, lambda family, folder: test_gptq_awq.save_gptq(family, folder, bits, desc_act=desc_act, less=less))


def gguf(kind: str, family: str, folder: Path) -> Made:
    folder.mkdir()
    path = gguf_files.write(folder / "model.gguf", family, kind)
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    return in_place(path, whole_model(folder, gguf_file=path.name, dtype=dtype), dtype=dtype)


def split(method: str, family: str, folder: Path) -> Made:
    saved = families.save(family, folder, torch.bfloat16, **test_compression.WIDE)
    take = test_compression.with_decoded_weights
    return Made(saved, lambda model: take(model, whole_model(saved)), {"compression": method, "fused_products": False})


def lossless(family: str, folder: Path) -> Made:
    saved = families.save(family, folder, torch.bfloat16, **WIDE)
    return in_place(saved, whole_model(saved), compression="lossless")


def quantised_by_bitsandbytes(scheme: str, family: str, folder: Path) -> Made:
    saved = families.save(family, folder, torch.bfloat16, **test_bitsandbytes_made.SIZES)
    config = BitsAndBytesConfig(**test_bitsandbytes_made.SCHEMES[scheme])
    return in_place(saved, test_bitsandbytes_made.whole_of(saved, scheme), quantization_config=config)


DENSE, SPARSE = ("llama", "qwen2", "phi3"), ("llama", "mixtral", "qwen3_moe")
PLAIN, OF_32, OF_256 = (
    ("F32", "F16", "BF16"),
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"),
    ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
)
TABLE: dict[str, tuple[str, Callable[[str, Path], Made], tuple[str, ...]]] = {
    "FP8 in blocks": ("transformers, dequantising", transformers_dequantises, ("llama", "deepseek_v3", "qwen3_moe")),
    "MXFP4": ("transformers, dequantising", transformers_dequantises, ("gpt_oss",)),
    **{
        f"bitsandbytes {scheme}": ("transformers with bitsandbytes", partial(transformers_with_bitsandbytes, scheme), DENSE)
        for scheme in ("nf4", "nf4, double quantisation", "fp4, computed in float32", "int8")
    },
    "GPTQ, 2 bits": (DECODED, gptq(2), SPARSE),
    "GPTQ, 3 bits": (DECODED, gptq(3), ("llama",)),
    "GPTQ, 4 bits": (DECODED, gptq(4), SPARSE),
    "GPTQ, 4 bits, desc_act": (DECODED, gptq(4, desc_act=True), SPARSE),
    "GPTQ v2, 8 bits": (DECODED, gptq(8, less=0), SPARSE),
    "AWQ, gemm": (DECODED, partial(decoded, test_gptq_awq.save_awq), SPARSE),
    **{
        f"compressed-tensors {test_compressed_tensors.SCHEMES[name][0]}, {name}": (DECODED, compressed(name), SPARSE)
        for name in test_compressed_tensors.SCHEMES
    },
    **{f"GGUF {kind}": ("transformers' load", partial(gguf, kind), ("llama", "gemma2", "qwen3moe")) for kind in (*PLAIN, *OF_32)},
    **{f"GGUF {kind}": ("transformers' load", partial(gguf, kind), ("llama", "gemma2", "minimax-m2")) for kind in OF_256},
    **{
        f'compression="{method}"': (f"{DECODED}, fused_products=False", partial(split, method), ("llama", "gemma3", "qwen3_moe"))
        for method in ("4bit", "8bit")
    },
    'compression="lossless"': ("transformers with the original weights", lossless, ("llama", "gemma3", "qwen3_moe")),
    **{
        f"BitsAndBytesConfig {name}": (
            "transformers with bitsandbytes",
            partial(quantised_by_bitsandbytes, scheme),
            ("llama_biased", "qwen3"),
        )
        for name, scheme in {
            "nf4": "nf4",
            "nf4, double quantisation": "nf4 twice",
            "fp4, computed in float32": "fp4 in float32",
            "int8": "int8",
        }.items()
    },
}


@pytest.mark.parametrize("encoding", TABLE)
def test_an_encoding_streams_with_the_bits_of_its_reference(
    encoding: str,
    tmp_path: Path,
    streamed: Any,
    ids: torch.Tensor,
    record_encoding: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, make, families = TABLE[encoding]
    by_expert = []
    monkeypatch.setattr("rabbit_engine.model.loading.why_lossless_gains_nothing", lambda *_: "")  # in memory it gains nothing
    for family in families:
        made = make(family, tmp_path / family)
        model = streamed(made.path, **made.keywords)
        whole = made.whole(model)
        assert model.plan.pass_bytes
        is_split = any(path.is_dir() for path in (tmp_path / family).rglob("rabbit_shards"))
        assert is_split == (not made.keywords.keys().isdisjoint({"compression", "quantization_config"}))
        with torch.no_grad():
            assert torch.equal(model(ids).logits, whole(ids).logits), family
        steps = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **steps), whole.generate(ids, **steps)), family
        by_expert += [family] if model.plan.experts.layers else []
    record_encoding(
        encoding=encoding,
        families=", ".join(families),
        logits="equal",
        text="equal",
        experts="one by one" if by_expert else "none in these",
        reference=reference,
    )
