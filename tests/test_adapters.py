"""Adapters over streamed weights give what they give over weights in memory, or are refused by their kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rabbit_engine import errors
from rabbit_engine.model.adapters import load_own_adapter

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("way", ["load_adapter", "PeftModel"])
def test_lora_inference_is_equal(way: str, adapter: Path, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = adapter.parent / "llama"
    outputs = []
    for load in (plain, streamed):
        model = load(folder)
        without = model.generate(ids, **GREEDY)
        if way == "load_adapter":
            model.load_adapter(str(adapter))
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
        with torch.no_grad():
            outputs.append((without, adapted(ids).logits, adapted.generate(input_ids=ids, **GREEDY)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert not torch.equal(outputs[0][0], outputs[0][2])


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_reads_weights_is_refused_by_its_name(
    settings: dict[str, Any], kind: str, adapter: Path, plain: Any, streamed: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = adapter.parent / "llama"
    LoraConfig(r=4, target_modules=["q_proj"], **settings).save_pretrained(tmp_path / "reads")
    model = streamed(folder)
    with pytest.raises(errors.WeightNotLoadedError, match=f"^{kind}.* reads weights that are streamed"):
        model.load_adapter(str(tmp_path / "reads"))
    whole = plain(folder)
    whole.load_adapter(str(adapter))
    model.load_adapter(str(adapter))
    assert torch.equal(model(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("way", ["load_adapter", "PeftModel"])
def test_an_adapter_with_its_base_layer_is_applied_if_that_is_unchanged(
    target: str, way: str, own_checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    """PEFT saves the base of an adapted head or embedding with the adapter."""
    folder = own_checkpoint("llama")
    get_peft_model(plain(folder), LoraConfig(r=4, target_modules=[target], init_lora_weights=False)).save_pretrained(tmp_path)
    whole, model = plain(folder), streamed(folder)
    without = model(ids).logits
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    base = next(name for name in weights if name.endswith(".base_layer.weight"))
    if way == "PeftModel":
        whole, model = (PeftModel.from_pretrained(each, str(tmp_path)).eval() for each in (whole, model))
    else:
        whole.load_adapter(str(tmp_path))
        save_file({**weights, base: weights[base] + 1}, file, {"format": "pt"})
        with pytest.raises(errors.CannotLoadStateError, match=rf"{target}\.weight with other values"):
            model.load_adapter(str(tmp_path))
        assert torch.equal(model(ids).logits, without)
        save_file(weights, file, {"format": "pt"})
        model.load_adapter(str(tmp_path))
    assert torch.equal(model(ids).logits, whole(ids).logits)
    assert not torch.equal(model(ids).logits, without)


def test_an_adapter_next_to_the_weights_is_applied(adapter: Path, streamed: Any, ids: torch.Tensor) -> None:
    folder = adapter.parent / "llama"
    without = streamed(folder)(ids).logits
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    logits = streamed(folder)(ids).logits
    assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
    assert not torch.equal(logits, without)


def test_an_adapter_next_to_the_weights_that_is_damaged_is_named(adapter: Path, streamed: Any) -> None:
    folder = adapter.parent / "llama"
    (folder / "adapter_config.json").write_text('{"peft_type": "none that exists"}')
    with pytest.raises(errors.DamagedCheckpointError, match=r"adapter_config\.json"):
        streamed(folder)


def test_merging_an_adapter_is_refused(adapter: Path, streamed: Any, ids: torch.Tensor) -> None:
    adapted = PeftModel.from_pretrained(streamed(adapter.parent / "llama"), str(adapter)).eval()
    before = adapted.generate(input_ids=ids, **GREEDY)
    with pytest.raises(errors.CannotMergeError, match="also runs unmerged"):
        adapted.merge_and_unload()
    assert before is not None


def test_training_an_adapter_is_refused(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = get_peft_model(streamed(checkpoint("llama")), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(errors.CannotTrainError):
        model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("resident", [True, False])
def test_an_adapter_of_experts_needs_them_in_memory(
    resident: bool, own_checkpoint: Any, plain: Any, streamed: Any, ids: Any, tmp_path: Path
) -> None:
    folder = own_checkpoint("mixtral")
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"], target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(plain(folder), config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    model = streamed(folder, **({"max_memory": None} if resident else {}))
    with torch.no_grad():
        before = model(ids).logits
        if resident:
            model.load_adapter(str(tmp_path / "adapter"))
            torch.testing.assert_close(model(ids).logits, adapted(ids).logits, rtol=0, atol=1e-6)
            return
        with pytest.raises(errors.CannotLoadStateError, match="adapter of the experts' own weights needs all of them in memory"):
            model.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(model(ids).logits, before)
        with pytest.raises(errors.CannotMergeError, match="its experts are read one by one"):
            get_peft_model(model, config)(ids)


@pytest.mark.parametrize(
    ("raised", "seen"), [(KeyboardInterrupt(), KeyboardInterrupt), (ValueError("rank"), errors.DamagedCheckpointError)]
)
def test_a_model_whose_own_adapter_fails_is_closed(raised: BaseException, seen: type[BaseException], tmp_path: Path) -> None:
    model, repo = Mock(), SimpleNamespace(names=("adapter_config.json",), folder=tmp_path, commit=None)
    model._checkpoint, model.load_adapter.side_effect = SimpleNamespace(repo=repo), raised
    with pytest.raises(seen):
        load_own_adapter(model)
    model.close.assert_called_once_with()
