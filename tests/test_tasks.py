"""The class for a task: chosen as by transformers, streamed in the smallest budget, bit-equal."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import aligned
from tiny import words
from transformers.utils import ModelOutput

import rabbit_engine
from rabbit_engine import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Session,
    errors,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
BART = {
    "vocab_size": 96,
    "d_model": 32,
    **{f"{part}_layers": 3 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
PIXELS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
SOUND = {**BART, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32}
IDS = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(1))
TEXT = {"input_ids": IDS}
IMAGE = {"pixel_values": torch.randn(2, 3, 8, 8)}
TO_TEXT = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}

CLASSES: list[tuple[str, str, dict[str, Any], dict[str, torch.Tensor]]] = [
    ("BertForSequenceClassification", "BertConfig", SIZES, TEXT),
    ("BertForMaskedLM", "BertConfig", SIZES, TEXT),
    ("BertModel", "BertConfig", SIZES, TEXT),
    ("BertForMultipleChoice", "BertConfig", SIZES, {"input_ids": IDS[None]}),
    ("BertForNextSentencePrediction", "BertConfig", SIZES, TEXT),
    ("RobertaForTokenClassification", "RobertaConfig", SIZES, TEXT),
    ("DistilBertForQuestionAnswering", "DistilBertConfig", {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_heads": 4}, TEXT),
    ("DebertaV2ForSequenceClassification", "DebertaV2Config", SIZES, TEXT),
    ("AlbertForMaskedLM", "AlbertConfig", {**SIZES, "embedding_size": 16}, TEXT),
    ("ElectraForPreTraining", "ElectraConfig", {**SIZES, "embedding_size": 16}, TEXT),
    ("LlamaForSequenceClassification", "LlamaConfig", SIZES, TEXT),
    ("Qwen3ForTokenClassification", "Qwen3Config", {**SIZES, **HEADS}, TEXT),
    ("Qwen2ForQuestionAnswering", "Qwen2Config", {**SIZES, "num_key_value_heads": 2}, TEXT),
    ("Gemma3TextModel", "Gemma3TextConfig", {**SIZES, **HEADS}, TEXT),
    ("T5ForConditionalGeneration", "T5Config", T5, TO_TEXT),
    ("T5EncoderModel", "T5Config", T5, TEXT),
    ("BartForConditionalGeneration", "BartConfig", BART, TO_TEXT),
    ("MarianMTModel", "MarianConfig", BART, TO_TEXT),
    ("WhisperForConditionalGeneration", "WhisperConfig", SOUND, {"input_features": torch.randn(2, 8, 20)}),
    ("ViTForImageClassification", "ViTConfig", PIXELS, IMAGE),
]


def save(cls: str, config: str, sizes: dict[str, Any], folder: Path) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def own(folder: Path, cls: str) -> Any:
    """transformers' own load."""
    return aligned(getattr(transformers, cls).from_pretrained(folder).eval())


def differing(found: ModelOutput, expected: ModelOutput) -> list[str]:
    """The outputs that are not bit-equal."""
    return [key for key, value in expected.items() if isinstance(value, torch.Tensor) and not torch.equal(found[key], value)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_text_from_text(options: dict[str, Any], tmp_path: Path) -> None:
    """By the auto class of its task; test_task_table has every class."""
    oracle = own(save("T5ForConditionalGeneration", "T5Config", T5, tmp_path), "T5ForConditionalGeneration")
    expected = oracle.generate(IDS, max_new_tokens=8, do_sample=False, **options)
    with AutoModelForSeq2SeqLM.from_pretrained(tmp_path, device="cpu", max_memory={"cpu": 2_000_000}) as model:
        before = model.profile.bytes_read
        assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False, **options), expected)
        assert model.profile.bytes_read >= before


def test_stacks_of_an_encoder_and_a_decoder_are_streamed_and_the_encoder_runs_once_a_text(tmp_path: Path, streamed: Any) -> None:
    model = streamed(save("BartForConditionalGeneration", "BartConfig", BART, tmp_path))
    encoder = [name for name in model.plan.streamed if ".encoder." in name]
    assert len(encoder) == 3
    assert len([name for name in model.plan.streamed if ".decoder." in name]) >= 3
    runs = dict.fromkeys(encoder, 0)
    for name in encoder:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1))
    model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert set(runs.values()) == {1}


def test_a_head_that_the_checkpoint_lacks_is_initialised_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save("BertForMaskedLM", "BertConfig", SIZES, tmp_path)
    torch.manual_seed(5)
    expected = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    torch.manual_seed(5)
    with (
        caplog.at_level(logging.WARNING, logger="rabbit_engine"),
        AutoModelForSequenceClassification.from_pretrained(folder, device="cpu", num_labels=3) as model,
    ):
        said = [record.getMessage() for record in caplog.records]
        assert any(
            "newly initialized: bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias" in line for line in said
        )
        assert model.config.num_labels == 3
        assert model(IDS).logits.shape == (2, 3)
        assert torch.equal(
            model.bert.encoder.layer[0].output.LayerNorm.weight, expected.bert.encoder.layer[0].output.LayerNorm.weight
        )


def test_the_base_of_the_class_must_be_whole(tmp_path: Path) -> None:
    folder = save("BertForMaskedLM", "BertConfig", SIZES, tmp_path)
    with pytest.raises(errors.MismatchedWeightsError, match=r"lacks weights of BertForTokenClassification: bert.encoder.layer.3"):
        AutoModelForTokenClassification.from_pretrained(folder, device="cpu", num_hidden_layers=4)


def test_labels_of_the_caller_are_those_of_the_model(tmp_path: Path) -> None:
    folder = save("BertForSequenceClassification", "BertConfig", {**SIZES, "num_labels": 2}, tmp_path)
    names = {0: "no", 1: "yes"}
    with AutoModelForSequenceClassification.from_pretrained(
        folder, device="cpu", id2label=names, problem_type="regression"
    ) as model:
        assert model.config.id2label == names
        assert model.config.problem_type == "regression"


def test_a_task_that_the_model_type_has_no_class_for_names_those_it_has(tmp_path: Path) -> None:
    folder = save("BertForMaskedLM", "BertConfig", SIZES, tmp_path)
    with pytest.raises(errors.UnsupportedArchitectureError) as raised:
        AutoModelForSeq2SeqLM.from_pretrained(folder, device="cpu")
    assert "transformers.AutoModelForSeq2SeqLM has no class for model_type 'bert'; there is AutoModel" in str(raised.value)
    assert "AutoModelForMaskedLM" in str(raised.value)


def test_a_causal_model_asked_for_by_its_task_is_the_one_that_auto_model_loads(checkpoint: Any, ids: torch.Tensor) -> None:
    folder = checkpoint("llama")
    with (
        AutoModelForCausalLM.from_pretrained(folder, device="cpu") as first,
        AutoModel.from_pretrained(folder, device="cpu") as second,
    ):
        assert type(first).__name__ == type(second).__name__
        assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize("split", ["never", "always"])
def test_a_model_of_another_task_can_be_split(split: str, tmp_path: Path) -> None:
    folder = save("BertForMaskedLM", "BertConfig", SIZES, tmp_path)
    expected = own(folder, "BertForMaskedLM")(IDS).logits
    for _ in range(2):
        with AutoModelForMaskedLM.from_pretrained(folder, device="cpu", split=split) as model:
            assert torch.equal(model(IDS).logits, expected)


def test_auto_classes_are_made_by_from_pretrained_only() -> None:
    names = [name for name in rabbit_engine.__all__ if name.startswith("AutoModel")]
    assert len(names) == 11
    for name in names:
        with pytest.raises(TypeError, match=rf"{name} cannot be instantiated: use {name}.from_pretrained"):
            getattr(rabbit_engine, name)()


def test_a_class_without_a_head_for_text_says_so(tmp_path: Path, streamed: Any, rabbit: Any) -> None:
    folder = save("BertForSequenceClassification", "BertConfig", SIZES, tmp_path)
    words(96).save_pretrained(folder)
    model = streamed(folder)
    with pytest.raises(errors.CannotGenerateError, match="BertForSequenceClassification does not generate text"):
        model.generate(IDS)
    model.tokenizer = words(96)
    with Session(model) as session, pytest.raises(errors.CannotGenerateError, match="does not generate text"):
        session.generate("w1 w2")
    assert "does not generate text" in rabbit("run", folder, "w1", "--no-chat").err
