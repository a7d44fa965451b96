"""Experts on demand: transformers' answer, from the routed experts alone, with any number of them cached."""

from __future__ import annotations

import inspect
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import smallest
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

from rabbit_engine import errors
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.experts import ExpertsPlan
from rabbit_engine.planning.placement import place
from rabbit_engine.storage.tensorfiles import read_header, write_aligned
from rabbit_engine.streaming import Binding, ExpertLayer, ExpertSlots, RoutedExperts, Trace, Transfer, make_unit, route
from rabbit_engine.streaming.binding import routed
from rabbit_engine.streaming.transfer.plain_ring import PlainRing
from rabbit_engine.streaming.transfer.unit import Extent
from rabbit_engine.transformers_bridge.forwards import cache_argument, cache_of

SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"]
SPARSE += ["phimoe", "glm4_moe", "jamba"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
FLAGS = inspect.signature(use_experts_implementation).parameters
EAGER_BOUND = 2e-5
"""float32 logits against `experts_implementation="eager"`, which sums in another order; the largest seen was 1.7e-5, in
transformers' own as well."""
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


@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("split", ["never", "always"])
def test_streamed_experts_give_transformers_answer(
    family: str, split: str, own_checkpoint: Any, plain: Any, streamed: Any, ids: Any, padded: Any
) -> None:
    folder = own_checkpoint(family)
    whole, eager, model = plain(folder), plain(folder, experts_implementation="eager"), streamed(folder, split=split)
    assert model.plan.experts.layers
    with torch.no_grad():
        for inputs in ({"input_ids": ids}, padded, {"input_ids": ids.repeat(1, 9)}):
            logits = model(**inputs).logits
            exact = family != "jamba" or inputs is not padded  # its state space rounds otherwise over padding, wherever it is
            torch.testing.assert_close(logits, whole(**inputs).logits, rtol=0, atol=0 if exact else EAGER_BOUND)
            torch.testing.assert_close(logits, eager(**inputs).logits, rtol=0, atol=EAGER_BOUND)
    for other in (whole, eager):
        assert torch.equal(model.generate(ids, **GREEDY), other.generate(ids, **GREEDY))
        assert torch.equal(model.generate(**padded, **GREEDY), other.generate(**padded, **GREEDY))


def test_a_width_that_no_vector_divides_is_within_the_bound(own_checkpoint: Any, plain: Any, streamed: Any, ids: Any) -> None:
    """GPT-OSS's activation runs over all rows as one: what is left over of them at the end is rounded by other code."""
    folder = own_checkpoint("gpt_oss", intermediate_size=48)
    whole, model = plain(folder), streamed(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=EAGER_BOUND)
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_bfloat16_is_equal_too(family: str, own_checkpoint: Any, plain: Any, streamed: Any, ids: Any) -> None:
    folder = own_checkpoint(family, dtype=torch.bfloat16)
    whole, model = plain(folder), streamed(folder)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))


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


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_autocast_and_inference_mode_are_equal(family: str, checkpoint: Any, plain: Any, streamed: Any, ids: Any) -> None:
    whole, model = plain(checkpoint(family)), streamed(checkpoint(family))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_two_sparse_models_at_once(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    """A streamed target and a streamed assistant share the readers."""
    model, assistant = streamed(checkpoint("mixtral")), streamed(checkpoint("qwen3_moe"))
    expected = plain(checkpoint("mixtral")).generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=assistant), expected)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_an_expert_with_one_row_is_equal_too(act: str, own_checkpoint: Any, plain: Any, streamed: Any, ids: Any) -> None:
    folder = own_checkpoint("mixtral", hidden_act=act)
    model, whole = streamed(folder), plain(folder)
    with torch.no_grad():
        assert all(torch.equal(model(ids[:, [at]]).logits, whole(ids[:, [at]]).logits) for at in range(6))


def test_sampled_text_is_equal(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    whole, model = plain(checkpoint("mixtral")), streamed(checkpoint("mixtral"))
    found = []
    for each in (whole, model):
        torch.manual_seed(11)
        found.append(each.generate(ids, max_new_tokens=12, do_sample=True, top_k=20, pad_token_id=0))
    assert torch.equal(*found)


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


def test_a_class_without_the_interface_moves_whole_and_the_plan_says_so(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama4"))
    assert not model.plan.experts.layers
    assert any("Llama4TextExperts" in note and "whole" in note for note in model.plan.notes), model.plan.notes


def test_jetmoe_moves_whole_too(tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "kv_channels": 8}
    config = transformers.JetMoeConfig(**sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    transformers.JetMoeForCausalLM(config).save_pretrained(tmp_path)
    model = streamed(tmp_path)
    experts = [note for note in model.plan.notes if "whole" in note]
    assert len(experts) == 1
    assert "JetMoeParallelExperts" in experts[0]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(tmp_path)(ids).logits)


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


def test_a_closed_model_says_so(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("mixtral"))
    experts = model.model.layers[0].mlp.experts
    model.close()
    with pytest.raises(errors.ModelClosedError):
        experts(torch.zeros(1, 32), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))


def test_a_layers_experts_alone_are_right(checkpoint: Any, plain: Any, streamed: Any) -> None:
    """Called outside a pass, and with an index past the last expert, which selects none."""
    module, whole = (load(checkpoint("mixtral")).model.layers[1].mlp.experts for load in (streamed, plain))
    generator = torch.Generator().manual_seed(3)
    states, weights = torch.randn(5, 32, generator=generator), torch.rand(5, 2, generator=generator)
    indices = torch.tensor([[0, 3], [3, 7], [11, 0], [5, 4], [4, 3]])
    with torch.no_grad():
        assert torch.equal(module(states, indices, weights), whole(states, indices, weights))
        indices[2, 1] = indices[4, 0] = 12
        whole._is_expert_parallel = True
        assert torch.equal(module(states, indices, weights), whole(states, indices, weights))
        nobody = torch.full_like(indices, 12)
        assert torch.equal(module(states, nobody, weights), torch.zeros(5, 32))
        assert module(states[:0], indices[:0], weights[:0]).shape == (0, 32)


def test_gradients_through_experts_are_refused(checkpoint: Any, streamed: Any) -> None:
    module = streamed(checkpoint("mixtral")).model.layers[1].mlp.experts
    states = torch.randn(1, 32, requires_grad=True)
    with pytest.raises(errors.CannotTrainError, match=r"mlp\.experts"):
        module(states, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))


def test_other_models_keep_transformers_experts(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    """Only a module with streamed experts uses our function; the model's own choice stays."""
    model = streamed(checkpoint("mixtral"))
    assert model.get_experts_implementation() == plain(checkpoint("mixtral")).get_experts_implementation()
    expected = model(ids).logits
    model.set_experts_implementation("eager")
    assert torch.equal(model(ids).logits, expected)
    AutoModelForCausalLM.from_config(model.config)(ids)
    with pytest.raises(errors.StreamingError, match=r"load this one with rabbit_engine\.AutoModel"):
        plain(checkpoint("mixtral"), experts_implementation=routed.IMPLEMENTATION)(ids)


def test_a_streamed_weight_names_itself(checkpoint: Any, streamed: Any) -> None:
    weight = streamed(checkpoint("mixtral")).model.layers[0].mlp.experts.gate_up_proj
    with pytest.raises(errors.WeightNotLoadedError, match=r"layers\.0\.mlp\.experts\.gate_up_proj"):
        weight.sum()


def experts_module(flags: dict[str, bool], count: int = 6, hidden: int = 32, width: int = 64) -> Any:
    """A module as the interface's decorator makes it, of random float32 weights; its implementation is transformers' default."""

    class Experts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = config.num_local_experts, torch.nn.functional.silu
            rows = 2 * width if flags.get("has_gate", True) else width
            first = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
            for name, shape in ((first, (rows, hidden)), ("down_proj", (hidden, width))):
                kept = shape[::-1] if flags.get("is_transposed") else shape
                setattr(self, name, torch.nn.Parameter(0.2 * torch.randn(count, *kept), requires_grad=False))
                if flags.get("has_bias"):
                    setattr(self, f"{name}_bias", torch.nn.Parameter(torch.randn(count, shape[0]), requires_grad=False))
            self.post_expert_norm = torch.nn.LayerNorm(hidden)

        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            raise AssertionError("the interface computes")

    config = transformers.MixtralConfig(num_local_experts=count, experts_implementation="grouped_mm")
    module: Any = use_experts_implementation(Experts, **flags)(config)
    return module


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"has_gate": False},
        {"has_bias": True},
        {"is_transposed": True},
        {"is_transposed": True, "has_bias": True, "is_concatenated": False},
        {"has_gate": False, "is_transposed": True, "has_bias": True},
        *([{"has_post_expert_norm": True}] if "has_post_expert_norm" in FLAGS else []),  # not in the oldest transformers
    ],
    ids=str,
)
def test_every_flag_of_the_interface_is_honoured(flags: dict[str, bool], tmp_path: Path) -> None:
    torch.manual_seed(7)
    module = experts_module(flags)
    path, stacks = tmp_path / "experts.safetensors", dict(module.named_parameters(recurse=False))
    write_aligned(path, {f"layer.{name}": stack.data for name, stack in stacks.items()}, {})
    entries = [t for t in read_header(path).tensors if not t.name.startswith("__pad__")]
    units = [make_unit(f"layer[{index}]", [entry.rows(index, index + 1) for entry in entries]) for index in range(6)]
    slot, cpu = max(unit.nbytes for unit in units), torch.device("cpu")
    ring = PlainRing(cpu, 4 * slot, Trace())
    transfer = Transfer([], ring, 0, slots=ExpertSlots(layers=[ExpertLayer("layer", units, 2, 2)], count=4, nbytes=slot))
    states, weights = torch.randn(20, 32), torch.rand(20, 2)
    indices = torch.rand(20, 6).topk(2).indices
    with torch.no_grad():
        expected = module(states, indices, weights)
        for name in stacks:
            delattr(module, name)
        route(module, RoutedExperts("layer", units, transfer.experts, Binding(transfer, cpu, Trace())))
        for _ in range(2):
            assert torch.equal(module(states, indices, weights), expected)
    transfer.close()


# The cache alone: two tiers on one device, as a GPU has them.

COUNT = 12


@pytest.fixture
def layer_units(tmp_path: Path) -> list[Any]:
    path = tmp_path / "experts.safetensors"
    write_aligned(
        path, {"l.up": torch.arange(COUNT * 3000.0).view(COUNT, 3000), "l.bias": torch.arange(COUNT * 5.0).view(COUNT, 5)}, {}
    )
    entries = [t for t in read_header(path).tensors if not t.name.startswith("__pad__")]
    return [make_unit(f"l[{index}]", [entry.rows(index, index + 1) for entry in entries]) for index in range(COUNT)]


@pytest.fixture
def make_transfer(layer_units: list[Any]) -> Iterator[Callable[..., Transfer]]:
    made: list[Transfer] = []

    def make(on_device: int, in_host: int, used: int = 2, passing: int = 2) -> Transfer:
        slot, count = max(unit.nbytes for unit in layer_units), passing + on_device
        ring = PlainRing(torch.device("cpu"), slot * count, Trace())
        host = PlainRing(torch.device("cpu"), slot * in_host, Trace()) if in_host else None
        layers = [ExpertLayer("l", layer_units, used, on_device, in_host)]
        made.append(Transfer([], ring, 0, slots=ExpertSlots(layers=layers, count=count, nbytes=slot, host=host)))
        return made[-1]

    yield make
    for transfer in made:
        transfer.close()


def bring(transfer: Transfer, units: list[Any], *indices: int) -> None:
    with transfer.experts.lend("l", dict.fromkeys(indices, 1.0), 1) as arrivals:
        found = []
        for index, memory in arrivals:
            found.append(index)
            for weight in units[index].weights:
                width = weight.entry.shape[1]
                assert torch.equal(weight.view(memory)[0], torch.arange(index * width, (index + 1) * width, dtype=torch.float32))
    assert sorted(found) == sorted(indices)


def kept(transfer: Transfer) -> set[int]:
    return {expert.index for expert in transfer.experts.layers["l"].kept()}


@pytest.mark.parametrize("tiers", [(0, 0), (3, 0), (0, 3), (2, 3), (12, 0), (5, 7)])
def test_any_two_tiers_bring_the_right_bytes(tiers: tuple[int, int], make_transfer: Any, layer_units: Any) -> None:
    transfer = make_transfer(*tiers)
    generator = torch.Generator().manual_seed(4)
    for _ in range(60):
        bring(transfer, layer_units, *torch.randperm(COUNT, generator=generator)[:3].tolist())
    bring(transfer, layer_units, *range(COUNT))
    profile = transfer.profile().experts["l"]
    stay = transfer.experts.layers["l"].kept()
    assert len(stay) == sum(tiers)
    assert sum(expert.in_host for expert in stay) == tiers[1]
    assert (profile.hit_rate > 0) == (sum(tiers) > 0)
    assert (profile.bytes_copied > 0) == (tiers[1] > 0)
    assert profile.read <= profile.used
    if sum(tiers) == COUNT:
        assert profile.read == COUNT


def test_the_least_used_expert_leaves_and_uses_fade(make_transfer: Any, layer_units: Any) -> None:
    transfer = make_transfer(4, 0)
    for _ in range(10):
        bring(transfer, layer_units, 0, 1)
    bring(transfer, layer_units, 2, 3)
    bring(transfer, layer_units, 4)
    assert {0, 1, 4} <= kept(transfer)
    for _ in range(100):
        bring(transfer, layer_units, 5, 6)
    bring(transfer, layer_units, 7, 8)
    assert kept(transfer) == {5, 6, 7, 8}


def test_a_layer_that_keeps_less_than_a_token_uses_keeps_the_most_used(make_transfer: Any, layer_units: Any) -> None:
    transfer = make_transfer(2, 0, used=3)
    for turn in range(12):
        bring(transfer, layer_units, 0, 1, 2 + turn % 10)
    assert kept(transfer) == {0, 1}
    assert transfer.profile().experts["l"].read <= 2 + 12 + 2


def test_a_prompt_warms_the_cache_with_what_it_used_most(make_transfer: Any, layer_units: Any) -> None:
    transfer = make_transfer(3, 0)
    bring(transfer, layer_units, 0, 1, 2)
    with transfer.experts.lend("l", {index: float(index) for index in range(COUNT)}, 40) as arrivals:
        assert len(list(arrivals)) == COUNT
    assert kept(transfer) == {9, 10, 11}


class SlowRing(PlainRing):
    """Reads of the units in `slow` take until they are let through."""

    slow: set[str]

    def fill(self, chunk: Extent, start: int, after: Any, name: str, lane: int) -> None:
        if name in self.slow:
            self.entered.set()
            assert self.gate.wait(20)
        super().fill(chunk, start, after, name, lane)

    def let_through(self) -> None:
        self.slow = set()
        self.gate.set()


def test_an_abandoned_read_spoils_no_other_expert(layer_units: Any) -> None:
    """An interrupt leaves a read under way to a slot that the layer keeps; the next pass may not give that slot away."""
    slot = max(unit.nbytes for unit in layer_units)
    ring = SlowRing(torch.device("cpu"), slot * 4, Trace())
    ring.slow, ring.gate, ring.entered = {"l[1]"}, threading.Event(), threading.Event()
    transfer = Transfer([], ring, 0, slots=ExpertSlots(layers=[ExpertLayer("l", layer_units, 1, 2)], count=4, nbytes=slot))
    with suppress(KeyboardInterrupt), transfer.experts.lend("l", {0: 1.0, 1: 1.0}, 1):
        assert ring.entered.wait(20)
        raise KeyboardInterrupt
    timer = threading.Timer(0.3, ring.let_through)
    timer.start()
    for _ in range(3):
        for indices in ((2, 3), (4, 5), (0, 1), (2, 1)):
            bring(transfer, layer_units, *indices)
    timer.join()
    transfer.close()


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


def test_each_sequence_of_a_batch_counts_alike() -> None:
    sequence = torch.arange(6).view(6, 1) % 3
    alone = routed.decayed_uses(sequence, [2, 2, 2], 6)
    batch = torch.cat([sequence, sequence + 3])
    both = routed.decayed_uses(batch, [2] * 6, 6)
    assert [both[index] for index in range(6)] == pytest.approx([alone[index % 3] for index in range(6)])
    assert both[2] > both[0]


def test_a_batch_is_as_long_as_one_of_its_sequences(own_checkpoint: Any, streamed: Any, padded: Any) -> None:
    model = streamed(own_checkpoint("mixtral"))
    with torch.no_grad():
        model(**padded)
    ages = {layer.age for layer in runtime_of(model).transfer.experts.layers.values()}
    assert ages == {padded["input_ids"].shape[1] / routed.HALF_LIFE_TOKENS}


def test_scores_survive_any_number_of_tokens(layer_units: Any) -> None:
    layer = ExpertLayer("l", layer_units, 2, 4)
    for tokens in (1, 10**6, 3, 10**9, 1):
        layer.count({0: 1.0, 1: 0.5}, tokens)
    layer.count({2: 1.0}, 1)
    scores = [expert.score for expert in layer.experts[:4]]
    assert scores[0] == pytest.approx(2 * scores[2], rel=0.05)
    assert scores[0] == pytest.approx(2 * scores[1])
    assert scores[3] == 0
    assert all(score < float("inf") for score in scores)
