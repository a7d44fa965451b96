"""The benchmark of quality: perplexities over overlapping contexts, and errors of decoded weights."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from rabbit_engine.model.runtime import runtime_of

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_quality


@pytest.mark.parametrize(("count", "context"), [(5, 8), (8, 8), (30, 8), (9, 8)])
def test_every_token_but_the_first_is_predicted_once(count: int, context: int) -> None:
    found = list(benchmark_quality.windows(count, context))
    predicted = [token for part, new in found for token in range(part.stop - new, part.stop)]
    assert predicted == list(range(1, count))
    assert all(part.stop - part.start <= context for part, _ in found)
    assert all(part.stop - part.start - new >= context // 2 for part, new in found[1:])


@torch.no_grad()
def test_perplexity_in_one_context_is_that_of_transformers_loss(checkpoint: Any, plain: Any, ids: torch.Tensor) -> None:
    whole = plain(checkpoint("llama"))
    perplexity, likeliest = benchmark_quality.predict(whole, ids[0], 64)
    found = whole(ids, labels=ids)
    assert perplexity == pytest.approx(math.exp(found.loss), rel=1e-5)
    assert likeliest.tolist() == found.logits[0, :-1].argmax(-1).tolist()


@pytest.mark.parametrize(("keywords", "least", "most"), [
    ({"compression": "4bit"}, 0.05, 0.12),
    ({"compression": "8bit"}, 0.003, 0.02),
    ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, 0.003, 0.02),
    ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}, 0.05, 0.12),
    ({}, 0, 0),
])  # fmt: skip
def test_errors_are_those_of_the_decoded_weights(
    keywords: Any, least: float, most: float, own_checkpoint: Any, streamed: Any
) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, head_dim=16)
    originals = runtime_of(streamed(folder)).checkpoint.entries
    encoded, error = benchmark_quality.error_of(runtime_of(streamed(folder, **keywords)).checkpoint.entries, originals)
    assert bool(encoded) == bool(keywords)
    assert least <= error <= most


def test_a_lossless_copy_is_measured_even_where_it_gains_nothing(own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=256)
    (tmp_path / "scratch").mkdir()
    lossless = benchmark_quality.Asked("lossless", folder, {"compression": "lossless"}).alone(tmp_path / "scratch")
    with lossless.load({"device": "cpu"}) as model, benchmark_quality.Asked("bf16", folder).load({"device": "cpu"}) as original:
        entries = [runtime_of(found).checkpoint.entries for found in (model, original)]
        encoded, error = benchmark_quality.error_of(*entries)
        ids = torch.arange(20)
        assert encoded
        assert error == 0
        assert benchmark_quality.predict(model, ids, 16)[0] == benchmark_quality.predict(original, ids, 16)[0]
    assert list(folder.glob("*.safetensors"))
