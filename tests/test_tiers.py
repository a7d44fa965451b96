"""Every mix of what stays, what passes through the ring and how finely it is cut gives the same logits and tokens."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import smallest
from transformers import AutoConfig, AutoModelForCausalLM

from rabbit_engine import AutoModel, errors
from rabbit_engine.config import DEFAULT_CUT, Cut, StreamConfig
from rabbit_engine.diagnostics.benchmark import make_checkpoint
from rabbit_engine.model.assembly import assemble
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.placement import place_in
from rabbit_engine.planning.tiers import Tier
from rabbit_engine.planning.weights import unread_entries
from rabbit_engine.streaming import LinearBlocks

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
FINE = Cut(least_bytes=1000, most_bytes=2500, rest_share=0.5)
"""Every module of a tiny model is a unit, and the head comes in several row blocks."""

ROW_BLOCK_BOUND = 2e-6
"""float32: a kernel may order its sums by the shape of the matrix; the largest difference seen was below 1e-6."""


@pytest.fixture(params=[FINE, DEFAULT_CUT], ids=["fine", "whole layers"])
def cut(request: pytest.FixtureRequest) -> Cut:
    found: Cut = request.param
    return found


@pytest.mark.parametrize("family", ["llama_tied", "llama_biased", "gemma3", "mixtral", "qwen3_next", "gpt2", "gemma4"])
def test_any_budget_and_any_cut_is_right(
    family: str, cut: Cut, checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor, padded: Any
) -> None:
    whole = plain(checkpoint(family))
    with torch.no_grad():
        expected, batch = whole(ids).logits, whole(**padded).logits
    tokens = whole.generate(ids, **GREEDY)
    first = streamed(checkpoint(family), cut=cut).plan
    low, high = int(first.budget.device_bytes or 0), first.weights_bytes + first.staging_bytes
    passes = []
    for part in (0, 0.4, 1):
        model = streamed(checkpoint(family), cut=cut, max_memory={"cpu": low + int((high - low) * part)})
        passes.append(model.plan.pass_bytes)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=ROW_BLOCK_BOUND if cut == FINE else 0)
            torch.testing.assert_close(model(**padded).logits, batch, rtol=0, atol=ROW_BLOCK_BOUND if cut == FINE else 0)
        assert torch.equal(model.generate(ids, **GREEDY), tokens)
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == 0
    assert passes[0] > 0 or family == "gemma4"  # its smallest budget holds everything


@pytest.mark.parametrize("beyond", [1, 4, 1000, 4095])
def test_a_budget_of_any_number_of_bytes_is_right(
    beyond: int, cut: Cut, checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    """A ring may end anywhere in a page; the data at its end may not."""
    folder = checkpoint("llama_biased")
    budget = int(smallest(folder, cut=cut)["cpu"]) + beyond
    model = streamed(folder, cut=cut, max_memory={"cpu": budget})
    assert model.plan.device_bytes + model.plan.staging_bytes <= budget
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(folder)(ids).logits, rtol=0, atol=ROW_BLOCK_BOUND)


def test_a_fine_cut_streams_modules_and_blocks(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"), cut=FINE)
    assert isinstance(model.lm_head.weight, LinearBlocks)
    assert "model.layers.1.mlp.up_proj" in model.plan.streamed
    assert "model.layers.1" in model.plan.resident  # its two norms
    assert sum(name.startswith("lm_head[") for name in model.plan.streamed) > 3
    largest = max(unit.nbytes for unit in runtime_of(model).transfer.units)
    assert model.plan.ring_bytes == 2 * largest < model.plan.weights_bytes / 5
    model.generate(ids, **GREEDY)
    assert model.profile.loads == 8 * len(model.plan.streamed)


def test_bytes_a_pass_are_exactly_the_plans(checkpoint: Any, streamed: Any, ids: torch.Tensor, cut: Cut) -> None:
    model = streamed(checkpoint("mistral"))
    transfer = runtime_of(model).transfer
    with torch.no_grad():
        model(ids)
        transfer.wait_until_idle()
        before = model.profile.bytes_read
        for _ in range(5):
            model(ids)
        transfer.wait_until_idle()
    assert model.profile.bytes_read - before == 5 * model.plan.pass_bytes


@pytest.mark.parametrize("adapter", ["load_adapter", "PeftModel"])
def test_lora_over_streamed_modules(
    adapter: str, checkpoint: Any, plain: Any, streamed: Any, ids: Any, tmp_path: Path, cut: Cut
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(plain(checkpoint("llama")), config).save_pretrained(tmp_path)
    whole, model = plain(checkpoint("llama")), streamed(checkpoint("llama"), cut=cut)
    if adapter == "PeftModel":
        whole, tuned = PeftModel.from_pretrained(whole, tmp_path), PeftModel.from_pretrained(model, tmp_path)
    else:
        whole.load_adapter(str(tmp_path))
        model.load_adapter(str(tmp_path))
        tuned = model
    with torch.no_grad():
        bound = ROW_BLOCK_BOUND if cut == FINE else 0
        torch.testing.assert_close(tuned(ids).logits, whole(ids).logits, rtol=0, atol=bound)
    assert torch.equal(tuned.generate(input_ids=ids, **GREEDY), whole.generate(input_ids=ids, **GREEDY))


def test_a_schedule_left_early_is_right_afterwards(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    model, whole = streamed(checkpoint("llama"), cut=FINE), plain(checkpoint("llama"))
    with torch.no_grad():
        expected = whole(ids).logits
        hidden = torch.randn(1, 3, 32)
        for _ in range(3):
            for index in (2, 0, 0, 1):  # out of order, and one twice
                got = model.model.layers[index].mlp(hidden)
                assert torch.equal(got, whole.model.layers[index].mlp(hidden))
            handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("early")))
            with pytest.raises(KeyError, match="early"):
                model(ids)
            handle.remove()
            assert runtime_of(model).transfer.held == ()
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=ROW_BLOCK_BOUND)


def test_a_target_and_an_assistant_side_by_side_waste_nothing(
    checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    target, assistant = streamed(checkpoint("llama"), cut=FINE), streamed(checkpoint("llama_wide_heads"), cut=FINE)
    expected = plain(checkpoint("llama")).generate(ids, **{**GREEDY, "max_new_tokens": 30})
    got = target.generate(ids, assistant_model=assistant, **{**GREEDY, "max_new_tokens": 30})
    assert torch.equal(got, expected)
    for model in (target, assistant):
        runtime_of(model).transfer.wait_until_idle()
        needed = model.profile.passes * model.plan.pass_bytes
        assert needed <= model.profile.bytes_read <= 1.01 * needed + model.plan.ring_bytes


def test_two_threads_over_one_model_and_two_models(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    models = {family: streamed(checkpoint(family), cut=FINE) for family in ("llama", "qwen3")}
    expected = {family: plain(checkpoint(family)).generate(ids, **GREEDY) for family in models}
    wrong: list[str] = []

    def work(family: str) -> None:
        for _ in range(4):
            if not torch.equal(models[family].generate(ids, **GREEDY), expected[family]):
                wrong.append(family)

    threads = [threading.Thread(target=work, args=(family,)) for family in models for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 210 MB in bf16, with matrices of 8 MiB: large enough for memory to be measured."""
    return make_checkpoint(tmp_path_factory.mktemp("large"), layers=6, hidden_size=1024)


def rss() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def test_peak_memory_stays_within_the_plan(large: Path, ids: torch.Tensor) -> None:
    budget = 90 * 10**6
    with AutoModel.from_pretrained(large, device="cpu", max_memory={"cpu": budget}) as warm:
        warm.generate(ids, **GREEDY)  # whatever kernels and libraries claim the first time
    before = rss()
    with AutoModel.from_pretrained(large, device="cpu", max_memory={"cpu": budget}) as model:
        plan = model.plan
        assert 0.9 * budget < plan.device_bytes + plan.staging_bytes <= budget < plan.weights_bytes / 2
        model.generate(ids, **GREEDY)
        peak = rss() - before
        held = [rss() for _ in range(3) if model.generate(ids, **GREEDY) is not None]
        assert peak < plan.device_bytes + plan.staging_bytes + 40 * 10**6
        assert max(held) - min(held) < 16 * 10**6  # a pass moves nine times as much
    assert rss() - before < 40 * 10**6


def test_bfloat16_head_in_blocks_is_equal(large: Path, ids: torch.Tensor) -> None:
    whole = AutoModelForCausalLM.from_pretrained(large).eval()
    for tensor in (*whole.parameters(), *whole.buffers()):
        tensor.data = tensor.data.clone()
    with AutoModel.from_pretrained(large, device="cpu", max_memory=smallest(large)) as model, torch.no_grad():
        assert isinstance(model.lm_head.weight, LinearBlocks)
        assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=2e-2)


def test_a_budget_below_the_smallest_loses_nothing(large: Path) -> None:
    with pytest.raises(errors.BudgetError, match=r'give max_memory=\{"cpu":') as caught:
        AutoModel.from_pretrained(large, device="cpu", max_memory={"cpu": "1MB"})
    with AutoModel.from_pretrained(large, device="cpu", max_memory={"cpu": caught.value.smallest_bytes}) as model:
        assert model.plan.device_bytes + model.plan.staging_bytes <= caught.value.smallest_bytes


def test_a_plan_with_another_machines_memory_is_refused_by_name(checkpoint: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint("llama")))
    tiers = [Tier("cpu", 10**9), Tier("node-2", 10**9, rate=1e10), Tier("disk", rate=1e9)]
    with pytest.raises(errors.ConfigurationError, match="cannot be kept on node-2 yet"):
        assemble(
            model,
            *unread_entries(model),
            StreamConfig(device=torch.device("cpu")),
            decide=lambda partition, _: place_in(partition.sizes, tiers),
        )
