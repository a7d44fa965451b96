"""The class that runs is the class that the checkpoint names, or an error; weights without a place are named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import talking
import torch
import transformers
from conftest import aligned
from safetensors.torch import save_file
from transformers import AutoConfig, Qwen2Config

from rabbit_engine import AutoModel, errors
from rabbit_engine.model.runtime import runtime_of

SIZES = {**talking.SIZES, "tie_word_embeddings": True}


def edit(folder: Path, **changes: Any) -> Path:
    """Change keys of the folder's config.json; None takes a key away."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}), "utf-8")
    return folder


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


HEADS = ["Qwen2ForSequenceClassification", "Qwen2ForTokenClassification", "Qwen2ForQuestionAnswering", "Qwen2Model"]


@pytest.mark.parametrize("name", HEADS)
def test_a_tied_checkpoint_of_another_head_runs_with_it(name: str, tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    getattr(transformers, name)(Qwen2Config(**SIZES)).save_pretrained(tmp_path)
    expected = aligned(getattr(transformers, name).from_pretrained(tmp_path).eval())(ids)
    model = streamed(tmp_path)
    assert type(model).__name__ == name
    found = model(ids)
    assert all(torch.equal(found[key], value) for key, value in expected.items() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["Qwen2ForRewardModel"]}, "Qwen2ForRewardModel.*model_type 'qwen2' builds a Qwen2ForCausalLM"),
        ({"architectures": ["LlavaQwenForCausalLM"]}, 'LlavaQwenForCausalLM.*write "architectures": \\["Qwen2ForCausalLM"\\]'),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM.*model_type 'qwen2' builds a Qwen2ForCausalLM"),
        ({"architectures": ["PeftModelForCausalLM"], "auto_map": {"AutoConfig": "a.B"}}, "trust_remote_code=True"),
        ({"architectures": ["Qwen2RewardModel"]}, "Qwen2RewardModel, but model_type 'qwen2' builds a Qwen2ForCausalLM"),
        ({"architectures": ["ViTForWhatever"], "model_type": "vit"}, "transformers has no such class for model_type 'vit'"),
        ({"architectures": ["InternLM2ForRewardModel"], "model_type": "internlm2"}, "InternLM2ForRewardModel"),
        ({"architectures": ["ChatGLMForSequenceClassification"], "model_type": "chatglm"}, "ChatGLMForSequenceClassification"),
    ],
)
def test_a_class_that_transformers_does_not_have_is_refused_by_name(changes: dict[str, Any], said: str, qwen: Path) -> None:
    with pytest.raises(errors.UnsupportedArchitectureError, match=said):
        AutoModel.from_pretrained(edit(qwen, **changes), device="cpu")


@pytest.mark.parametrize(
    ("name", "model_type", "changes"),
    [("BertForMaskedLM", "bert", {}), ("BertModel", "bert", {}), ("T5EncoderModel", "t5", {"d_model": 32})],
)
def test_the_class_that_a_config_names_must_find_its_weights(name: str, model_type: str, changes: Any, qwen: Path) -> None:
    with pytest.raises(errors.MismatchedWeightsError, match=f"lacks weights of {name}"):
        AutoModel.from_pretrained(edit(qwen, architectures=[name], model_type=model_type, **changes), device="cpu")


@pytest.mark.parametrize(
    "named",
    [
        ["Qwen2ForCausalLM"],
        ["QWen2forCausalLM"],
        ["FSDPQwen2ForCausalLM"],
        ["Qwen2ForSequenceClassification", "Qwen2ForCausalLM"],
        [],
        None,
    ],
)
def test_a_class_that_generates_runs_however_it_is_written(named: Any, qwen: Path, ids: torch.Tensor) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(qwen)(ids).logits
    with AutoModel.from_pretrained(edit(qwen, architectures=named), device="cpu") as model:
        assert type(model).__name__ == "Qwen2ForCausalLM"
        torch.testing.assert_close(model(ids).logits, expected)


def test_one_class_as_a_text_is_accepted_as_by_transformers(qwen: Path) -> None:
    edit(qwen, architectures="Qwen2ForCausalLM")
    try:
        transformers.AutoConfig.from_pretrained(qwen)
    except Exception:  # older versions ask for a list
        with pytest.raises(errors.UnsupportedArchitectureError, match="architectures"):
            AutoModel.from_pretrained(qwen, device="cpu")
        return
    with AutoModel.from_pretrained(qwen, device="cpu") as model:
        assert type(model).__name__ == "Qwen2ForCausalLM"


@pytest.mark.parametrize("named", ["", {"a": 1}, [1], [None], 3, [""]])
def test_architectures_that_are_no_names_are_damage(named: Any, qwen: Path) -> None:
    with pytest.raises(errors.DamagedCheckpointError, match=r"config.json has architectures="):
        AutoModel.from_pretrained(edit(qwen, architectures=named), device="cpu")


@pytest.mark.parametrize("auto_map", ["x", [1], {"AutoModelForCausalLM": 5}])
def test_a_damaged_auto_map_is_named(auto_map: Any, qwen: Path) -> None:
    with pytest.raises(errors.RabbitError, match="auto_map="):
        AutoModel.from_pretrained(edit(qwen, auto_map=auto_map), device="cpu", trust_remote_code=True)


@pytest.mark.parametrize("split", ["never", "always"])
def test_weights_without_a_place_are_named_once_a_load(
    split: str, tmp_path: Path, ids: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    saved = transformers.Qwen2ForSequenceClassification(Qwen2Config(**SIZES, num_labels=3))
    saved.save_pretrained(tmp_path)
    edit(tmp_path, architectures=None)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    for _ in range(2):  # the second time there are shards
        caplog.clear()
        with caplog.at_level(logging.WARNING), AutoModel.from_pretrained(tmp_path, device="cpu", split=split) as model:
            torch.testing.assert_close(model(ids).logits, expected)
        said = [record.getMessage() for record in caplog.records if "no place" in record.getMessage()]
        assert said == ["1 weights of the checkpoint have no place in Qwen2ForCausalLM and are not used: score.weight"]


@pytest.mark.parametrize(("extra", "named"), [("transformer.h.0.attn.bias", False), ("transformer.h.0.attn.other", True)])
def test_weights_that_the_class_ignores_are_not_named(
    extra: str, named: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64))
    state = {name: tensor for name, tensor in saved.state_dict().items() if name != "lm_head.weight"}
    saved.save_pretrained(tmp_path)
    save_file({**state, extra: torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING), AutoModel.from_pretrained(tmp_path, device="cpu"):
        assert (extra in caplog.text) == named


def test_a_load_changes_no_config_of_the_caller(qwen: Path, ids: torch.Tensor) -> None:
    edit(qwen, head_dim=4)
    before = AutoConfig.from_pretrained(qwen).to_dict()
    for _ in range(2):
        with AutoModel.from_pretrained(qwen, device="cpu") as model:
            assert runtime_of(model).architecture.config.head_dim == 4
            assert model.config.head_dim != 4 or not hasattr(model.config, "head_dim")
    assert AutoConfig.from_pretrained(qwen).to_dict() == before
