"""On a CUDA device: the same tokens, the memory that the plan said, a slot reused only after its event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import smallest

from rabbit_engine import Session
from rabbit_engine.model.runtime import runtime_of

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
    """There transformers groups the experts of a pass in its own kernels; ours run one by one. None to all cached."""
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
    assert {span.lane.split()[0] for span in runtime_of(model).trace.spans()} >= {"copy", "compute"}


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


@pytest.mark.parametrize("exact", [True, False])
def test_a_session_serves_many_texts_in_one_pass(checkpoint: Any, streamed: Any, smollm_model: Any, exact: bool) -> None:
    """Seeded drawing too: the device's generator travels with its fiber."""
    model = streamed(checkpoint("llama"), device="cuda:0")
    asked = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    options = {**GREEDY, "eos_token_id": [2, 95]}  # the tokenizer's own, which a session heeds, is 2
    alone = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in asked]
    torch.manual_seed(3)
    drawn = model.generate(torch.tensor([asked[0]]), **{**options, "do_sample": True})[0, 4:].tolist()
    model.tokenizer = smollm_model.tokenizer
    model.generation_config.eos_token_id = [2, 95]
    with Session(model, exact=exact) as session:
        before = model.profile.passes
        found = [list(reply.tokens) for reply in session.generate(asked, max_new_tokens=8, temperature=0)]
        assert model.profile.passes - before < 2 * 8
        seeded = list(session.generate([asked[0]], max_new_tokens=8, seed=3)[0].tokens)
    if exact:
        assert found == alone
        assert seeded == drawn
    else:
        assert [len(tokens) for tokens in found] == [len(tokens) for tokens in alone]
