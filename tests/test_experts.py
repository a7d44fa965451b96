"""Experts on demand: transformers' answer, from the routed experts alone, with any number of them cached."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

from rabbit_engine import errors
from rabbit_engine.storage.tensorfiles import read_header, write_aligned
from rabbit_engine.streaming import (
    Binding,
    ExpertLayer,
    ExpertSlots,
    RoutedExperts,
    Trace,
    Transfer,
    UnitWeights,
    make_unit,
    route,
)
from rabbit_engine.streaming.binding import routed
from rabbit_engine.streaming.transfer.plain_ring import PlainRing

SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"]
SPARSE += ["phimoe", "glm4_moe", "jamba"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
FLAGS = inspect.signature(use_experts_implementation).parameters
EAGER_BOUND = 2e-5
"""float32 logits against `experts_implementation="eager"`, which sums in another order; the largest seen was 1.7e-5, in
transformers' own as well."""


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


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_autocast_and_inference_mode_are_equal(family: str, checkpoint: Any, plain: Any, streamed: Any, ids: Any) -> None:
    whole, model = plain(checkpoint(family)), streamed(checkpoint(family))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_a_bfloat16_model_runs_under_float16_autocast(own_checkpoint: Any, streamed: Any, plain: Any, ids: Any) -> None:
    """Some experts have a single row, and torch promotes no float16 with bfloat16."""
    folder = own_checkpoint("mixtral", dtype=torch.bfloat16)
    model, whole = streamed(folder), plain(folder)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
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
        route(
            module,
            RoutedExperts(
                "layer", units, transfer.experts, Binding(transfer, cpu, Trace()), [UnitWeights(unit) for unit in units]
            ),
        )
        for _ in range(2):
            assert torch.equal(module(states, indices, weights), expected)
    transfer.close()
