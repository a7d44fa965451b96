"""Experts in any budget: the same bits, the bytes read that the plan gives, and nothing lost by a pass that fails."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import smallest

from rabbit_engine import AutoModel, errors
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.experts import ExpertsPlan
from rabbit_engine.planning.placement import place
from rabbit_engine.streaming.binding import routed
from rabbit_engine.streaming.transfer.unit import Extent
from rabbit_engine.transformers_bridge.forwards import cache_argument, cache_of

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
MIDDLE = {"num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "hidden_size": 64}


def middle_budget(streamed: Any, folder: Path, share: float) -> dict[int | str, int | str]:
    """The smallest budget in which `share` of all experts are cached, found by halving."""
    model = streamed(folder)
    plan, sizes = model.plan, runtime_of(model).partition.sizes
    low, high = int(plan.budget.device_bytes) - 1, plan.weights_bytes + plan.staging_bytes
    while high - low > 1:
        middle = (low + high) // 2
        experts = place(sizes, "cpu", replace(plan.budget, device_bytes=middle)).experts
        enough = not experts.layers or sum(layer.on_device for layer in experts.layers) >= share * counts(experts)
        low, high = (low, middle) if enough else (middle, high)
    return {"cpu": high}


def counts(experts: ExpertsPlan) -> int:
    return sum(layer.routing.count for layer in experts.layers)


def routing_of(model: Any) -> tuple[list[tuple[str, torch.Tensor]], Callable[[], None]]:
    """The requests to every experts module from now on: (its name, the indices)."""
    seen: list[tuple[str, torch.Tensor]] = []

    def note(name: str) -> Any:
        return lambda _, args: seen.append((name, args[1].clone()))

    names = [layer.name for layer in model.plan.experts.layers]
    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    return seen, lambda: [hook.remove() for hook in hooks] and None


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_a_cache_of_any_size_gives_the_same_bits(
    family: str, checkpoint: Any, plain: Any, streamed: Any, ids: Any, padded: Any
) -> None:
    folder = checkpoint(family)
    whole = plain(folder)
    modes: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"assistant_model": plain(folder)}]
    with torch.no_grad():
        logits = whole(ids).logits
    expected = [whole.generate(ids, **GREEDY, **mode) for mode in modes]
    batch = whole.generate(**padded, **GREEDY)
    first = streamed(folder).plan
    slot = first.experts.slot_bytes
    low, high = int(first.budget.device_bytes), first.weights_bytes + first.staging_bytes
    shares = set()
    for budget in [*range(low, high, max(slot, (high - low) // 4)), high]:
        model = streamed(folder, max_memory={"cpu": budget})
        experts = model.plan.experts
        shares.add(sum(layer.on_device for layer in experts.layers) / counts(experts) if experts.layers else 1.0)
        for mode, tokens in zip(modes, expected, strict=True):
            assert torch.equal(model.generate(ids, **GREEDY, **mode), tokens)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(**padded, **GREEDY), batch)
        assert model.profile.bytes_read > 0 or not model.plan.pass_bytes
    assert min(shares) == 0
    assert max(shares) == 1.0
    assert len(shares) > 3


@pytest.mark.parametrize("beyond", [1, 4, 512, 1000, 4000])
def test_a_budget_of_any_number_of_bytes_is_right(beyond: int, own_checkpoint: Any, plain: Any, streamed: Any, ids: Any) -> None:
    """A ring may end anywhere in a page; slots for experts may not."""
    folder = own_checkpoint("qwen3_moe", **MIDDLE, mlp_only_layers=[])
    low = int(smallest(folder)["cpu"])
    model = streamed(folder, max_memory={"cpu": low + beyond})
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(folder)(ids).logits)


@pytest.mark.parametrize("split", ["never", "always"])
def test_the_bytes_read_are_those_of_the_routed_experts(
    split: str, own_checkpoint: Any, streamed: Any, ids: torch.Tensor
) -> None:
    """64 experts, 4 routed, none cached: counted by the requests to the layers."""
    model = streamed(own_checkpoint("qwen3_moe", **MIDDLE, mlp_only_layers=[]), split=split)
    assert all(layer.on_device == 0 and layer.routing.used == 4 for layer in model.plan.experts.layers)
    seen, _ = routing_of(model)
    model.generate(ids, **GREEDY)
    units = runtime_of(model).partition.experts
    asked = [(name, index) for name, indices in seen for index in indices.unique().tolist()]
    profile = model.profile
    assert sum(layer.bytes_read for layer in profile.experts.values()) == sum(units[n][i].read_bytes for n, i in asked)
    assert sum(layer.used for layer in profile.experts.values()) == len(asked)
    assert profile.hit_rate == 0
    decoded = [indices for _, indices in seen if len(indices) == 1]
    assert len(decoded) == 7 * 3
    assert all(indices.unique().numel() == 4 for indices in decoded)
    whole = sum(unit.nbytes for name in units for unit in units[name])
    token = sum(units[n][i].read_bytes for n, indices in seen[-3:] for i in indices.unique().tolist())
    assert token <= model.plan.experts.most_bytes < whole / 10


def test_a_prompt_reads_each_expert_it_needs_once(own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("qwen3_moe", **MIDDLE, mlp_only_layers=[])
    prompt = torch.randint(3, 96, (2, 120), generator=torch.Generator().manual_seed(1))
    model = streamed(folder)
    seen, _ = routing_of(model)
    with torch.no_grad():
        model(prompt)
    for name, indices in seen:
        assert model.profile.experts[name].read == indices.unique().numel()
        assert model.profile.experts[name].runs == 1
    assert model.profile.bytes_read <= model.plan.prompt_bytes + model.plan.ring_bytes


def test_a_cache_of_half_hits_more_than_half_on_skewed_routing(own_checkpoint: Any, streamed: Any) -> None:
    """Two of four tokens of the text are the same word: the experts it is routed to are hot."""
    folder = own_checkpoint("qwen3_moe", **MIDDLE, mlp_only_layers=[])
    model = streamed(folder, max_memory=middle_budget(streamed, folder, 0.5))
    share = sum(layer.on_device for layer in model.plan.experts.layers) / counts(model.plan.experts)
    assert 0.5 <= share < 0.7
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(3, 96, (300,), generator=generator)
    text[torch.rand(300, generator=generator) < 0.5] = 7
    past = cache_argument(model.forward, cache_of(model(text[None, :40], use_cache=True)))
    before = {name: (layer.used, layer.read) for name, layer in model.profile.experts.items()}
    for token in text[40:]:
        model(token[None, None], **past)
    used = sum(layer.used - before[name][0] for name, layer in model.profile.experts.items())
    read = sum(layer.read - before[name][1] for name, layer in model.profile.experts.items())
    assert 1 - read / used > share + 0.1
    assert "experts" in str(model.profile)


def test_everything_cached_reads_nothing_more(own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("qwen3_moe", **MIDDLE, mlp_only_layers=[])
    model = streamed(folder, max_memory=middle_budget(streamed, folder, 0.95))
    prompt = torch.randint(3, 96, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(3):
            model(prompt[:, :4])
        runtime_of(model).transfer.wait_until_idle()
        read = sum(layer.read for layer in model.profile.experts.values())
        model(prompt[:, :4])
    assert sum(layer.read for layer in model.profile.experts.values()) == read
    assert model.plan.least_pass_bytes == model.plan.pass_bytes - model.plan.experts.most_bytes


def test_too_small_a_budget_speaks_of_experts(checkpoint: Any, streamed: Any) -> None:
    with pytest.raises(errors.BudgetError, match=r"\(a ring and slots for experts of .* and what must stay\)"):
        streamed(checkpoint("mixtral"), max_memory={"cpu": 1})


def test_the_plan_gives_a_range_and_holds(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("qwen3_moe", **MIDDLE, mlp_only_layers=[])
    plan = streamed(folder).plan
    rows = dict(plan.rows())
    assert rows["experts"].startswith("12 of 192 a token")
    assert "each expert once" in rows["a prompt"]
    assert plan.pass_bytes == plan.least_pass_bytes
    model = streamed(folder, max_memory=middle_budget(streamed, folder, 0.03))
    plan = model.plan
    assert plan.least_pass_bytes < plan.pass_bytes < plan.prompt_bytes
    assert " (as many experts cached as possible) to " in dict(plan.rows())["a pass"]
    past = cache_argument(model.forward, cache_of(model(ids)))
    for token in range(5, 15):
        runtime_of(model).transfer.wait_until_idle()
        before = model.profile.bytes_read
        model(torch.tensor([[token]]), **past)
        runtime_of(model).transfer.wait_until_idle()
        assert plan.least_pass_bytes <= model.profile.bytes_read - before <= plan.pass_bytes
    assert runtime_of(model).binding is not None
    assert plan.device_bytes + plan.staging_bytes <= int(plan.budget.device_bytes)


def failing(model: Any, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> Counter[str]:
    """Reads of `name` fail once."""
    ring, tries = runtime_of(model).ring, Counter[str]()
    native = ring.fill

    def fill(chunk: Extent, start: int, after: Any, unit: str, lane: int) -> None:
        tries[unit] += 1
        if unit == name and tries[unit] == 1:
            raise error
        native(chunk, start, after, unit, lane)

    monkeypatch.setattr(ring, "fill", fill)
    return tries


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(5, "Input/output error"), errors.StreamingError),
        (errors.DamagedShardError("x is cut off"), errors.DamagedShardError),
    ],
)
def test_a_read_that_fails_names_the_expert_and_the_next_call_is_right(
    share: float,
    error: Exception,
    kind: type[Exception],
    own_checkpoint: Any,
    plain: Any,
    streamed: Any,
    ids: Any,
    monkeypatch: Any,
) -> None:
    folder = own_checkpoint("mixtral")
    budget, name = middle_budget(streamed, folder, share), "model.layers.1.mlp.experts"
    first, model = streamed(folder), streamed(folder, max_memory=budget)
    seen, _ = routing_of(first)
    with torch.no_grad():
        expected = plain(folder)(ids).logits
        first(ids)
    victim = next(index for module, indices in seen if module == name for index in indices.unique().tolist())
    failing(model, monkeypatch, f"{name}[{victim}]", error)
    with torch.no_grad():
        with pytest.raises(kind, match=rf"{name}\[{victim}\] could not be read: .*{str(error).rpartition(' ')[2]}"):
            model(ids)
        for _ in range(3):
            assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, **GREEDY), plain(folder).generate(ids, **GREEDY))


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_an_interrupt_amid_the_experts_leaves_nothing_behind(
    share: float, own_checkpoint: Any, plain: Any, streamed: Any, ids: Any, monkeypatch: Any
) -> None:
    folder = own_checkpoint("mixtral")
    model, whole = streamed(folder, max_memory=middle_budget(streamed, folder, share)), plain(folder)
    expected = whole.generate(ids, **GREEDY)
    native, calls = routed.run_expert, Counter[str]()

    def interrupted(*args: Any) -> torch.Tensor:
        calls["all"] += 1
        if calls["all"] % 7 == 3 and calls["all"] < 60:
            raise KeyboardInterrupt
        return native(*args)

    monkeypatch.setattr(routed, "run_expert", interrupted)
    interrupts = 0
    while True:
        try:
            assert torch.equal(model.generate(ids, **GREEDY), expected)
            break
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts >= 8
    cache, plan = runtime_of(model).transfer.experts, model.plan.experts
    kept = sum(len(layer.kept()) for layer in cache.layers.values())
    assert cache.free_slots == plan.device_bytes // plan.slot_bytes - kept


def test_a_model_closed_amid_a_pass_says_so(own_checkpoint: Any, streamed: Any, ids: Any, monkeypatch: Any) -> None:
    folder = own_checkpoint("mixtral")
    model = streamed(folder, max_memory=middle_budget(streamed, folder, 0.4))
    native, calls = routed.run_expert, Counter[str]()

    def closing(*args: Any) -> torch.Tensor:
        calls["all"] += 1
        if calls["all"] == 3:
            threading.Thread(target=model.close).start()
            while runtime_of(model).ring.view(0, 1).numel() != 0:
                time.sleep(0.01)
        return native(*args)

    monkeypatch.setattr(routed, "run_expert", closing)
    with torch.no_grad(), pytest.raises(errors.ModelClosedError):
        model(ids)


def test_the_next_start_begins_with_the_experts_used_most(
    own_checkpoint: Any, streamed: Any, ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RABBIT_ENGINE_CACHE", str(tmp_path / "cache"))
    folder = own_checkpoint("qwen3_moe", **MIDDLE)
    budget = middle_budget(streamed, folder, 0.5)

    def first_reads() -> tuple[int, torch.Tensor]:
        with AutoModel.from_pretrained(folder, device="cpu", max_memory=budget) as model:
            found = model.generate(ids, **GREEDY)
            return sum(layer.read for layer in model.profile.experts.values()), found

    cold, text = first_reads()
    (kept,) = (tmp_path / "cache" / "experts").iterdir()
    warm, again = first_reads()
    assert warm < 0.7 * cold
    assert torch.equal(text, again)
    for damaged in (b"[1", b'{"model.layers.0.mlp.experts": {"999": 1, "x": 2, "1": "much", "2": NaN}}', b"[]"):
        kept.write_bytes(damaged)
        assert first_reads()[0] == cold
    monkeypatch.setenv("RABBIT_ENGINE_CACHE", "")
    assert first_reads()[0] == cold
