"""On a CUDA device: the same tokens, the memory that the plan said, a slot reused only after its event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import smallest

pytestmark = pytest.mark.gpu
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_tokens_are_equal(
    family: str, dtype: torch.dtype, tmp_path: Path, plain: Any, streamed: Any, ids: Any
) -> None:
    folder = families.save(family, tmp_path, dtype=dtype)
    whole, model = plain(folder).to("cuda"), streamed(folder, device="cuda")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids.cuda()).logits)
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids.cuda(), **GREEDY))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("host", [None, "120MB"])
def test_experts_on_demand_are_within_rounding(
    family: str, host: str | None, tmp_path: Path, plain: Any, streamed: Any, ids: Any
) -> None:
    """transformers groups the experts of a pass in kernels of their own there; ours run one by one. None to all cached."""
    folder = families.save(family, tmp_path, dtype=torch.float32)
    whole, first = plain(folder).to("cuda"), streamed(folder, device="cuda")
    assert first.plan.experts.layers
    with torch.no_grad():
        expected = whole(ids.cuda()).logits
    low, high = int(first.plan.budget.device_bytes), first.plan.weights_bytes
    for budget in range(low, high, max(1, (high - low) // 5)):
        model = streamed(folder, device="cuda", max_memory={0: budget, **({"cpu": host} if host else {})})
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)
        assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids.cuda(), **GREEDY))


def test_many_passes_over_wide_layers_never_see_a_slot_too_early(tmp_path: Path, plain: Any, streamed: Any, ids: Any) -> None:
    keywords = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 6,
        "head_dim": 512,
        "max_position_embeddings": 64,
    }
    folder = families.save("llama", tmp_path, dtype=torch.bfloat16, **keywords)
    whole, model = plain(folder).to("cuda"), streamed(folder, device="cuda")
    with torch.no_grad():
        expected = whole(ids.cuda()).logits
        for _ in range(20):
            assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("host", ["120MB", "1GB"])
def test_from_disk_and_from_host_memory(host: str, tmp_path: Path, plain: Any, streamed: Any, ids: Any) -> None:
    """With 120 MB nearly all of the host's share are staging buffers: the weights come from disk."""
    keywords = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "head_dim": 512}
    folder = families.save("llama", tmp_path, dtype=torch.bfloat16, **keywords)
    whole, budget = plain(folder).to("cuda"), smallest(folder, device="cuda")
    model = streamed(folder, device="cuda", max_memory={**budget, "cpu": host}, profiling_mode=True)
    assert (model.plan.pass_bytes > 0) == (host == "120MB")
    for _ in range(3):
        assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids.cuda(), **GREEDY))
    assert {span.lane.split()[0] for span in model._assembly.trace.spans()} >= {"copy", "compute"}


def test_memory_stays_within_the_plan(tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    keywords = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "head_dim": 512}
    folder = families.save("llama", tmp_path, dtype=torch.bfloat16, **keywords)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = streamed(folder, device="cuda")
    model.generate(ids, **GREEDY)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < model.plan.device_bytes + 32 * 2**20
    assert peak < 0.5 * model.plan.weights_bytes
    model.close()
    assert torch.cuda.memory_allocated() - before < 16 * 2**20


def test_static_cache_is_not_compiled(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"), device="cuda:0")
    expected = plain(checkpoint("llama")).to("cuda").generate(ids.cuda(), **GREEDY)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)
