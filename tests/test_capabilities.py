"""What `capabilities` and `rabbit show` say of checkpoints, from their configs and headers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import gguf_files
import pytest
import torch
import transformers
from fake_hub import FakeHub
from matrix import ORACLES
from test_quantised import FP8, rewrite, to_fp8
from test_tasks import BART, CLASSES, SIZES, T5, save
from tiny import words

import rabbit_engine
from rabbit_engine import capabilities, errors

TASKS = {
    "BertForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "BertForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "BertModel": ("AutoModel", "feature-extraction"),
    "BertForMultipleChoice": ("AutoModelForMultipleChoice", "multiple-choice"),
    "BertForNextSentencePrediction": ("AutoModelForNextSentencePrediction", "next-sentence-prediction"),
    "RobertaForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "DistilBertForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "LlamaForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "T5ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "T5EncoderModel": ("AutoModelForTextEncoding", "text-encoding"),
    "WhisperForConditionalGeneration": ("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    "ViTForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}


@pytest.mark.parametrize("row", [row for row in CLASSES if row[0] in TASKS], ids=lambda row: row[0])
def test_the_class_of_a_checkpoint_has_its_task(row: Any, tmp_path: Path) -> None:
    cls, config, sizes, _ = row
    found = capabilities(save(cls, config, sizes, tmp_path))
    assert (found.cls, (found.auto_class, found.task)) == (cls, TASKS[cls])
    assert found.auto_class in found.auto_classes or found.auto_class not in vars(rabbit_engine)
    assert (found.streams_in_place, found.must_split, found.stored.keys()) == (True, False, {"F32"})
    whole = getattr(transformers, cls).from_pretrained(tmp_path)
    assert (found.parameters, found.can_generate) == (whole.num_parameters(), whole.can_generate())
    assert found.weights_bytes == 4 * found.parameters


def test_stacks_and_what_else_the_model_type_can_be(tmp_path: Path) -> None:
    found = capabilities(save("BartForConditionalGeneration", "BartConfig", BART, tmp_path))
    assert (found.layers, found.towers, found.can_generate) == (3, 3, True)
    assert {"AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification", "AutoModel"} <= set(found.auto_classes)


def test_the_length_of_a_text_is_the_smallest_that_is_stated(tmp_path: Path) -> None:
    sizes = {**SIZES, "max_position_embeddings": 514, "pad_token_id": 1}
    folder = save("RobertaForTokenClassification", "RobertaConfig", sizes, tmp_path)
    assert capabilities(folder).lengths == {"max_position_embeddings": 512}
    tokenizer = words(96)
    tokenizer.model_max_length = 400
    tokenizer.save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256, "do_lower_case": False}))
    found = capabilities(folder)
    assert found.lengths == {
        "max_position_embeddings": 512,
        "tokenizer_config.json: model_max_length": 400,
        "sentence_bert_config.json: max_seq_length": 256,
    }
    assert found.context_length == 256


def test_lengths_under_other_names(tmp_path: Path, checkpoint: Any) -> None:
    assert "n_positions" in capabilities(checkpoint("gpt2")).lengths
    assert "max_seq_len" in capabilities(checkpoint("mpt")).lengths
    unlimited = capabilities(save("T5EncoderModel", "T5Config", T5, tmp_path))
    assert (unlimited.lengths, unlimited.context_length, dict(unlimited.rows())["context"]) == ({}, None, "not stated")


def test_local_attention_is_told_where_layers_use_it(checkpoint: Any) -> None:
    assert capabilities(checkpoint("gemma3")).sliding_window == families.build("gemma3").config.sliding_window
    assert capabilities(checkpoint("qwen2")).sliding_window is None


def test_attention_that_the_class_supports(checkpoint: Any, tmp_path: Path) -> None:
    assert capabilities(checkpoint("llama")).attention == ("eager", "sdpa", "flash_attention_2")
    assert "sdpa" not in capabilities(checkpoint("gpt_oss")).attention
    sizes = {"vocab_size": 96, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    assert capabilities(save("MambaForCausalLM", "MambaConfig", sizes, tmp_path)).attention == ()


def test_experts_of_a_layer_and_of_a_token(checkpoint: Any) -> None:
    config = families.build("qwen3_moe").config
    assert capabilities(checkpoint("qwen3_moe")).experts == (config.num_experts, config.num_experts_per_tok)
    assert capabilities(checkpoint("llama")).experts is None


def test_labels_of_a_classifier(tmp_path: Path) -> None:
    sizes = {**SIZES, "id2label": {0: "calm", 1: "angry", 2: "sad"}}
    found = capabilities(save("BertForSequenceClassification", "BertConfig", sizes, tmp_path))
    assert found.labels == ("calm", "angry", "sad")
    assert dict(found.rows())["labels"] == "3: calm, angry, sad"


def test_encodings_of_a_gguf_file_with_its_template(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "tiny.gguf", "llama", "Q8_0", head="Q6_K")
    found = capabilities(path)
    assert (found.quantization, found.cls, found.has_chat_template) == ("gguf", "LlamaForCausalLM", False)
    assert {"Q8_0", "F32"} <= found.stored.keys()
    assert found.weights_bytes < path.stat().st_size


def test_encodings_of_fp8(own_checkpoint: Any) -> None:
    found = capabilities(rewrite(own_checkpoint("llama"), to_fp8, FP8))
    assert found.quantization == "fp8"
    assert {"F8_E4M3", "F32"} == found.stored.keys()
    assert found.streams_in_place


def test_a_checkpoint_that_must_be_split_says_why_and_one_that_was_where(own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    before = capabilities(folder, dtype="bfloat16")
    assert (before.must_split, before.streams_in_place, before.dtype) == (True, False, torch.bfloat16)
    assert "stored as torch.float32" in before.source
    assert before.stored.keys() == {"F32"}
    model = rabbit_engine.AutoModel.from_pretrained(folder, device="cpu", dtype="bfloat16")
    model.close()
    after = capabilities(folder, dtype="bfloat16")
    assert (after.must_split, after.streams_in_place, after.stored.keys()) == (False, False, {"BF16"})
    assert "streamed from the shards in" in after.source


def test_pickles_are_measured_without_reading_them(tmp_path: Path) -> None:
    model = families.build("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = capabilities(tmp_path, dtype="float32")
    assert found.must_split
    assert found.weights_bytes == 4 * found.parameters


def test_a_repo_of_the_hub_is_described_from_its_headers(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repo"
    shutil.copytree(checkpoint("llama"), folder, ignore=shutil.ignore_patterns("rabbit_shards", ".*"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with FakeHub(repos={"someone/tiny": folder}).as_the_hub(monkeypatch) as hub:
        hub.head_only = True
        found = capabilities("someone/tiny", cache_dir=tmp_path / "cache")
    here = capabilities(folder)
    assert (found.stored, found.parameters, found.has_chat_template) == (here.stored, here.parameters, True)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_an_embedder_of_sentence_transformers_is_one(own_checkpoint: Any) -> None:
    folder = own_checkpoint("qwen3")
    assert capabilities(folder).task == "text-generation"
    (folder / "modules.json").write_text("[]")
    assert capabilities(folder).task == "feature-extraction"


def test_a_converted_family_is_described_as_what_it_becomes() -> None:
    found = capabilities(ORACLES / "baichuan1_13b")
    assert (found.cls, found.auto_class, found.task) == ("AlibiLlamaForCausalLM", "AutoModelForCausalLM", "text-generation")
    assert found.auto_classes == ("AutoModelForCausalLM",)


def test_what_loading_refuses_is_refused(tmp_path: Path, own_checkpoint: Any) -> None:
    with pytest.raises(errors.CheckpointNotFoundError):
        capabilities(tmp_path)
    with pytest.raises(errors.ConfigurationError, match="revison"):
        capabilities(own_checkpoint("llama"), revison="main")
    folder = own_checkpoint("llama")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(errors.DamagedCheckpointError, match=r"tokenizer_config.json cannot be read"):
        capabilities(folder)


def test_the_command_prints_it(rabbit: Any, tmp_path: Path) -> None:
    folder = save("BertForSequenceClassification", "BertConfig", SIZES, tmp_path)
    done = rabbit("show", folder)
    assert done.code == 0
    for row in ("text-classification", "BertForSequenceClassification (bert)", "2: LABEL_0, LABEL_1", "eager, sdpa"):
        assert row in done.out
    assert "F32" in str(capabilities(folder))
    assert repr(capabilities(folder)).startswith(f"Capabilities('{folder}': text-classification, ")
    assert rabbit("show", tmp_path / "nothing").code == 1
