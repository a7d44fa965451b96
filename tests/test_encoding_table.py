"""The table of encodings in COMPATIBILITY.md: tiny checkpoints in each, in the smallest budget, against their reference.

`make encodings` records what ran.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_bitsandbytes
import test_compressed_tensors
import test_gptq_awq
import test_quantised
import torch
from conftest import aligned
from transformers import AutoModelForCausalLM

Made = tuple[Path, Any]
"""A checkpoint, and the whole model that it must equal."""

DECODED = "transformers with the decoded weights"


def transformers_dequantises(family: str, folder: Path) -> Made:
    return test_quantised.quantised(family, folder)


def transformers_with_bitsandbytes(scheme: str, family: str, folder: Path) -> Made:
    heads = {"head_dim": None} if family in ("qwen2", "phi3") else {}
    saved = test_bitsandbytes.save(family, folder, scheme, **heads)
    return saved, test_bitsandbytes.load(saved)


def decoded(save: Callable[[str, Path], tuple[Path, Path]], family: str, folder: Path) -> Made:
    saved, plain = save(family, folder)
    return saved, aligned(AutoModelForCausalLM.from_pretrained(plain).eval())


def compressed(name: str) -> Callable[[str, Path], Made]:
    return partial(decoded, lambda family, folder: test_compressed_tensors.save(family, folder, name))


def gptq(bits: int, *, desc_act: bool = False, less: int = 1) -> Callable[[str, Path], Made]:
    return partial(decoded, lambda family, folder: test_gptq_awq.save_gptq(family, folder, bits, desc_act=desc_act, less=less))


DENSE, SPARSE = ("llama", "qwen2", "phi3"), ("llama", "mixtral", "qwen3_moe")
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
}


@pytest.mark.parametrize("encoding", TABLE)
def test_an_encoding_streams_with_the_bits_of_its_reference(
    encoding: str, tmp_path: Path, streamed: Any, ids: torch.Tensor, record_encoding: Callable[..., None]
) -> None:
    reference, make, families = TABLE[encoding]
    by_expert = []
    for family in families:
        folder, whole = make(family, tmp_path / family)
        model = streamed(folder)
        assert model.plan.streamed
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []  # nothing is split
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
