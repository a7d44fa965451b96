"""Adapters of a model in stages: its layers compute with them where they are, as those of the model on one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import talking
import test_cluster_stage
import test_devices
import torch
from long_texts import answer, prompt
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache

from rabbit_engine import Session, errors
from rabbit_engine.model.runtime import runtime_of

row, over_workers = test_devices.row, test_cluster_stage.over_workers  # fixtures

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
"""On modules of all layers."""
OTHER = LoraConfig(r=2, lora_alpha=16, target_modules=["v_proj", "q_proj"], layers_to_transform=[2])
"""On other modules, of one layer."""


@pytest.fixture(autouse=True)
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' methods but `load_adapter` ask for a version of peft that need not be out."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18", raising=False)


@pytest.fixture
def saved(checkpoint: Any, plain: Any, tmp_path: Path) -> Callable[..., str]:
    """`saved(config)`: the folder of an adapter with random weights."""

    def save(config: Any, family: str = "llama", seed: int = 3) -> str:
        model = get_peft_model(plain(checkpoint(family)), config)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                nn.init.normal_(parameter, std=0.3)
        folder = tmp_path / f"{config.peft_type.value}-{seed}"
        model.save_pretrained(folder)
        return str(folder)

    return save


STEPS: dict[str, Callable[[Any], Any]] = {
    "other": lambda model: model.set_adapter("other"),
    "both": lambda model: model.set_adapter(["default", "other"]),
    "none": lambda model: model.disable_adapters(),
    "both again": lambda model: model.enable_adapters(),
    "the first": lambda model: model.set_adapter("default"),
    "scaled": lambda model: [one.set_scale("default", 3.0) for one in model.modules() if hasattr(one, "set_scale")],
    "changed": lambda model: next(one for name, one in model.named_parameters() if "2.mlp.down_proj.lora_B" in name).neg_(),
    "deleted": lambda model: model.delete_adapter("default"),
    "without": lambda model: model.delete_adapter("other"),
}


def follow(model: Any, folders: tuple[str, str], ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits, as loaded and after each step."""
    with torch.no_grad():
        found = [model(ids).logits]
        model.load_adapter(folders[0])
        found.append(model(ids).logits)
        model.load_adapter(folders[1], "other")
        found.append(model(ids).logits)
        for step in STEPS.values():
            step(model)
            found.extend(model(ids).logits for _ in range(2))
    return found


def test_the_methods_of_transformers(row: Any, saved: Any, checkpoint: Any, plain: Any, ids: Any) -> None:
    folders = saved(LORA), saved(OTHER, seed=4)
    theirs, mine = (follow(model, folders, ids) for model in (plain(checkpoint("llama")), row()))
    assert all(map(torch.equal, mine, theirs))
    different = [theirs[index] for index in (0, 1, 3, 5, 13, 15, 17)]
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(different))


def test_active_adapters_and_their_weights(row: Any, saved: Any, checkpoint: Any, plain: Any) -> None:
    states = []
    for model in (plain(checkpoint("llama")), row()):
        model.load_adapter(saved(LORA))
        model.load_adapter(saved(OTHER, seed=4), "other")
        model.set_adapter("other")
        assert model.active_adapters() == ["other"]
        states.append(model.get_adapter_state_dict("default"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("config", [LORA, IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])])
def test_a_model_that_peft_wraps(config: Any, row: Any, saved: Any, checkpoint: Any, plain: Any, ids: Any) -> None:
    folder = saved(config)
    found = []
    for model in (plain(checkpoint("llama")), row()):
        adapted = PeftModel.from_pretrained(model, folder).eval()
        found.append([adapted.generate(input_ids=ids, **GREEDY, output_logits=True, return_dict_in_generate=True).logits])
        with adapted.disable_adapter():
            found[-1].append(adapted.generate(input_ids=ids, **GREEDY, output_logits=True, return_dict_in_generate=True).logits)
    for mine, theirs in zip(*found, strict=True):
        assert all(map(torch.equal, mine, theirs))
    assert not torch.equal(found[0][0][0], found[0][1][0])


def test_sessions(row: Any, saved: Any, checkpoint: Any, plain: Any) -> None:
    whole, model = plain(checkpoint("llama")), row()
    model.tokenizer = talking.make_tokenizer()
    texts = [[5 + index, *range(7, 30)] for index in range(3)]
    with Session(model) as session:
        for change in (lambda one: one.load_adapter(saved(LORA)), lambda one: one.disable_adapters()):
            change(whole)
            change(model)
            expected = [whole.generate(torch.tensor([text]), **GREEDY)[0, len(text) :].tolist() for text in texts]
            replies = session.generate(texts, max_new_tokens=6, temperature=0)
            assert [list(reply.tokens) for reply in replies] == expected


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"use_dora": True}, errors.WeightNotLoadedError, "DoRA.* on other devices: load the model on one device"),
        ({"init_lora_weights": "pissa"}, errors.WeightNotLoadedError, "PiSSA"),
    ],
)
def test_kinds_that_read_weights_are_refused(
    settings: Any, error: type[Exception], message: str, row: Any, saved: Any, ids: Any, tmp_path: Path
) -> None:
    model = row()
    expected = model(ids).logits
    LoraConfig(r=4, target_modules=["q_proj"], **settings).save_pretrained(tmp_path / "reads")
    with pytest.raises(error, match=message):
        model.load_adapter(str(tmp_path / "reads"))
    assert torch.equal(model(ids).logits, expected)
    adapted = PeftModel.from_pretrained(model, saved(LORA)).eval()
    with pytest.raises(errors.CannotMergeError):
        adapted.merge_and_unload()


def test_an_adapter_of_experts_is_refused(row: Any, saved: Any, ids: Any) -> None:
    model = row("mixtral")
    expected = model(ids).logits
    config = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"], target_modules=["q_proj"])
    with pytest.raises(errors.CannotLoadStateError, match="experts"):
        model.load_adapter(saved(config, "mixtral"))
    assert torch.equal(model(ids).logits, expected)


def test_requests_that_wait_at_a_stage_each_have_their_adapters(row: Any, saved: Any, ids: Any) -> None:
    model = row()
    model.load_adapter(saved(LORA))
    model.load_adapter(saved(OTHER, seed=4), "other")
    (stage,) = runtime_of(model).assembly.stages
    submit, requests, expected = stage.submit, [], []
    stage.submit = lambda request: (requests.append(request), submit(request))[1]
    for active in (["default"], ["other"], ["default", "other"]):
        model.set_adapter(active)
        del requests[:-1]
        with torch.no_grad():
            model(ids, use_cache=False)
        expected.append((requests[-1], submit(requests[-1]).result().output))
    assert len({request.setting.adapters for request, _ in expected}) == 3
    answers = [(submit(request), output) for _ in range(4) for request, output in expected for _ in range(2)]
    assert all(torch.equal(answer.result().output, output) for answer, output in answers)


def test_other_modules_are_refused(row: Any, ids: Any) -> None:
    model = row()
    layer = model.model.layers[-1]
    layer.mlp.act_fn, loaded = nn.Tanh(), layer.mlp.act_fn
    with pytest.raises(errors.UnsupportedOperationError, match=r"mlp\.act_fn of layer . was replaced by Tanh"):
        model(ids)
    layer.mlp.act_fn = loaded
    layer.mlp.add_module("more", nn.Tanh())
    with pytest.raises(errors.UnsupportedOperationError, match="were added"):
        model(ids)


def test_a_stage_without_peft_is_named(row: Any, saved: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = row()
    expected = model(ids).logits

    def load(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'peft'")

    monkeypatch.setattr("rabbit_engine.streaming.stages.adapted._Unpacker.load", load)
    with pytest.raises(errors.MissingExtraError, match="where a stage of the model runs: No module named 'peft'"):
        model.load_adapter(saved(LORA))
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_workers_that_end_amid_a_text(
    when: str,
    checkpoint: Any,
    over_workers: test_cluster_stage.Staged,
    plain: Any,
    saved: Any,
) -> None:
    """A text whose first tokens were computed with an adapter that is gone goes on after its worker ended."""
    whole, (model, here) = plain(checkpoint("llama")), over_workers(checkpoint("llama"))
    found = []
    for one in (whole, model):
        one.load_adapter(saved(LORA))
        cache = DynamicCache(config=one.config.get_text_config())
        with torch.no_grad():
            logits = [one(prompt(11), past_key_values=cache).logits]
            one.load_adapter(saved(OTHER, seed=4), "other")
            one.set_adapter("other")
            logits.append(one(prompt(5), past_key_values=cache).logits)
            one.delete_adapter(["default", "other"])
            for step in range(4):
                if one is model and step == 1:
                    here.ends = lambda number, last=here.requests: when if number in (last + 1, last + 9) else ""
                logits.append(one(torch.tensor([[5 + step]]), past_key_values=cache).logits)
        found.append(logits)
        del cache
    assert all(map(torch.equal, *found))
    assert here.started >= 3
    model.load_adapter(saved(LORA))
    whole.load_adapter(saved(LORA))
    here.ends = lambda number, last=here.requests: when if number in (last + 3, last + 9) else ""
    assert torch.equal(answer(model, prompt(11)).sequences, answer(whole, prompt(11)).sequences)
    model.delete_adapter("default")
    model(prompt(3))
    for stage in runtime_of(model).assembly.stages:
        assert stage._adapters.all() == []
