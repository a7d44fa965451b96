"""Tasks over many texts: vectors and labels, bit-equal to transformers one by one, in few passes over the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tasks import LONG, TEXTS, encoded, open_both
from test_tasks import HEADS, SIZES, save
from tiny import pieces_of_words

from rabbit_engine import AutoModel, Session, errors

ENCODERS = [
    ("BertModel", "BertConfig", SIZES),
    ("RobertaModel", "RobertaConfig", SIZES),
    ("Qwen3Model", "Qwen3Config", {**SIZES, **HEADS}),
]
CLASSIFIERS = [
    ("BertForSequenceClassification", "BertConfig", SIZES),
    ("RobertaForSequenceClassification", "RobertaConfig", SIZES),
    ("DistilBertForSequenceClassification", "DistilBertConfig", {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_heads": 4}),
    ("LlamaForSequenceClassification", "LlamaConfig", SIZES),
    ("Qwen3ForSequenceClassification", "Qwen3Config", {**SIZES, **HEADS}),
]


@pytest.fixture
def opened(tmp_path: Path, streamed: Any) -> Callable[..., Any]:
    """`opened(cls, config, sizes, files)`: see `open_both`."""
    return lambda cls, config, sizes, files=None: open_both(tmp_path, streamed, (cls, config, sizes), files)


def sentence_files(pooling: str, **more: Any) -> dict[str, Any]:
    kinds = ["Transformer", "Pooling", "Normalize"]
    steps = [{"path": "1_Pooling" if kind == "Pooling" else "", "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    return {"modules.json": steps, "1_Pooling/config.json": {f"pooling_mode_{pooling}": True}, **more}


def states(oracle: Any, text: str, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return oracle.base_model(**encoded(text, **given)).last_hidden_state[0]


@pytest.mark.parametrize("row", ENCODERS, ids=lambda row: row[0])
def test_vectors_of_many_texts_are_those_of_each_alone(row: Any, opened: Any) -> None:
    model, oracle = opened(*row)
    with Session(model) as session:
        found, one = session.embed(TEXTS), session.embed(TEXTS[1])
    expected = torch.stack([states(oracle, text).sum(dim=0) / len(encoded(text)["input_ids"][0]) for text in TEXTS])
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(one, expected[1])


def test_texts_share_the_passes_over_the_weights(tmp_path: Path) -> None:
    folder = save("BertModel", "BertConfig", SIZES, tmp_path)
    pieces_of_words(96).save_pretrained(folder)
    with (
        AutoModel.from_pretrained(folder, device="cpu", max_memory={"cpu": "4MB"}) as model,
        Session(model, max_requests=2) as session,
    ):
        before = model.profile.passes
        session.embed(TEXTS * 20)
        assert model.profile.passes - before == 1


@pytest.mark.parametrize("pooling", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_each_pooling_is_that_of_sentence_transformers(pooling: str, opened: Any) -> None:
    model, oracle = opened(*ENCODERS[0])
    with Session(model) as session:
        found, padded = session.embed(TEXTS, pooling=pooling), session.embed(TEXTS, pooling=pooling, exact=False)
    for text, vector in zip(TEXTS, found, strict=True):
        hidden = states(oracle, text)
        weights = torch.arange(1.0, len(hidden) + 1)[:, None]
        expected = {
            "cls": hidden[0],
            "max": hidden.amax(dim=0),
            "mean": hidden.mean(dim=0),
            "mean_sqrt_len_tokens": hidden.sum(dim=0) / len(hidden) ** 0.5,
            "weightedmean": (hidden * weights).sum(dim=0) / weights.sum(),
            "lasttoken": hidden[-1],
        }[pooling]
        torch.testing.assert_close(vector, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded, found, rtol=1e-5, atol=1e-5)


def test_an_embedder_published_as_a_causal_model_pools_its_last_token_and_leaves_its_head_unread(opened: Any) -> None:
    prompts = {"prompts": {"query": "w60 w61 ", "document": ""}, "default_prompt_name": None}
    files = sentence_files("lasttoken", **{"config_sentence_transformers.json": prompts})
    sizes = {**SIZES, **HEADS, "tie_word_embeddings": False}
    model, oracle = opened("Qwen3ForCausalLM", "Qwen3Config", sizes, files)
    runs = []
    model.lm_head.register_forward_hook(lambda *_: runs.append(1))
    with Session(model) as session:
        found = session.embed(TEXTS, prompt="query")
        short = session.embed(TEXTS, prompt="query", dimensions=8)
        plain = session.embed(TEXTS[0], normalize=False)
    last = torch.stack([states(oracle, f"w60 w61 {text}")[-1] for text in TEXTS])
    assert torch.equal(found, torch.nn.functional.normalize(last, dim=-1))
    assert torch.equal(short, torch.nn.functional.normalize(last[:, :8], dim=-1))
    assert torch.equal(plain, states(oracle, TEXTS[0])[-1])
    assert runs == []


def test_the_default_prompt_goes_before_every_text(opened: Any) -> None:
    prompts = {"prompts": {"query": "w60 "}, "default_prompt_name": "query"}
    files = sentence_files("cls_token", **{"config_sentence_transformers.json": prompts})
    model, _ = opened(*ENCODERS[0], files)
    with Session(model) as session:
        assert torch.equal(session.embed("w5"), session.embed("w60 w5", prompt=""))
        assert torch.equal(session.embed("w5", prompt="w61 w62 "), session.embed("w61 w62 w5", prompt=""))
        with pytest.raises(errors.ConfigurationError, match=r"no prompt named 'querry'; its prompts are: query"):
            session.embed("w5", prompt="querry")


def test_several_poolings_are_joined(opened: Any) -> None:
    config = {"pooling_mode": ["max", "cls"]}
    model, oracle = opened(*ENCODERS[0], {**sentence_files("cls_token"), "1_Pooling/config.json": config})
    with Session(model) as session:
        found = session.embed(TEXTS[0], normalize=False)
    hidden = states(oracle, TEXTS[0])
    assert torch.equal(found, torch.cat([hidden.amax(dim=0), hidden[0]]))


def test_a_long_text_is_refused_truncated_or_embedded_in_windows(opened: Any) -> None:
    files = sentence_files("mean_tokens", **{"sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": False}})
    model, oracle = opened(*ENCODERS[0], files)
    with Session(model) as session:
        with pytest.raises(errors.PromptTooLongError, match="text 1: 62 tokens are more than the 20 that fit"):
            session.embed([TEXTS[0], LONG])
        cut = session.embed([TEXTS[0], LONG], truncation=True, normalize=False)[1]
        windows = session.embed(LONG, stride=6, normalize=False)
        with pytest.raises(errors.ConfigurationError, match="stride=19"):
            session.embed(LONG, stride=19)
    assert torch.equal(cut, states(oracle, LONG, truncation=True, max_length=20).sum(dim=0) / 20)
    split = pieces_of_words(96)(LONG, truncation=True, max_length=20, stride=6, return_overflowing_tokens=True)["input_ids"]
    assert len(split) == 5
    with torch.no_grad():
        every = torch.cat([oracle(torch.tensor([ids])).last_hidden_state[0] for ids in split])
    torch.testing.assert_close(windows, every.mean(dim=0), rtol=1e-5, atol=1e-6)


def test_a_text_of_more_tokens_than_positions_is_refused(opened: Any) -> None:
    model, _ = opened("RobertaModel", "RobertaConfig", {**SIZES, "max_position_embeddings": 40})  # the first position is 1
    with Session(model) as session:
        assert session.embed([[5] * 39]).shape == (1, 32)
        with pytest.raises(errors.PromptTooLongError, match="40 tokens are more than the 39 that fit"):
            session.embed([[5] * 40])


@pytest.mark.parametrize("row", CLASSIFIERS, ids=lambda row: row[0])
@pytest.mark.parametrize(
    "problem", [{"num_labels": 3}, {"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}], ids=str
)
def test_labels_are_those_of_the_text_classification_pipeline(row: Any, problem: dict[str, Any], opened: Any) -> None:
    cls, config, sizes = row
    model, oracle = opened(cls, config, {**sizes, "pad_token_id": 0, **problem})
    pipeline = transformers.pipeline("text-classification", model=oracle, tokenizer=_plain_inputs(oracle), device="cpu")
    with Session(model) as session:
        found, near = session.classify(TEXTS), session.classify(TEXTS, exact=False)
        one = session.classify(TEXTS[2])
    for text, own_found, close in zip(TEXTS, found, near, strict=True):
        expected = pipeline(text, top_k=None)
        assert [{"label": each.label, "score": each.score} for each in own_found.scores] == expected
        assert [each.score for each in close.scores] == pytest.approx([each["score"] for each in expected], abs=1e-5)
    assert (one.label, one.score) == (found[2].label, found[2].scores[0].score)


def _plain_inputs(oracle: Any) -> Any:
    """The tokenizer with the inputs that the class takes."""
    kinds = ["token_type_ids"] if hasattr(oracle, "bert") else []
    return pieces_of_words(96, model_input_names=["input_ids", *kinds, "attention_mask"])


def test_a_regression_has_its_logit_and_names_of_the_checkpoint(opened: Any) -> None:
    sizes = {**SIZES, "num_labels": 1, "problem_type": "regression", "id2label": {0: "stars"}}
    model, oracle = opened("BertForSequenceClassification", "BertConfig", sizes)
    with Session(model) as session:
        (found,) = session.classify([TEXTS[0]])
    with torch.no_grad():
        assert (found.label, found.score) == ("stars", oracle(**encoded(TEXTS[0])).logits.item())


def test_pairs_of_texts_are_classified_as_pairs(opened: Any) -> None:
    model, oracle = opened("BertForSequenceClassification", "BertConfig", {**SIZES, "num_labels": 3})
    pipeline = transformers.pipeline("text-classification", model=oracle, tokenizer=pieces_of_words(96), device="cpu")
    with Session(model) as session:
        (found,) = session.classify([("w5 w6", "w7 w8 w9")])
    expected = pipeline({"text": "w5 w6", "text_pair": "w7 w8 w9"}, top_k=None)
    assert [{"label": each.label, "score": each.score} for each in found.scores] == expected


def test_a_model_without_a_head_for_labels_says_what_it_has(opened: Any) -> None:
    model, _ = opened("BertForMaskedLM", "BertConfig", SIZES)
    with Session(model) as session, pytest.raises(errors.WrongHeadError) as raised:
        session.classify("w5")
    assert "BertForMaskedLM has no head for labels of texts: its head computes masked tokens." in str(raised.value)
    assert "load it with rabbit_engine.AutoModelForSequenceClassification" in str(raised.value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["w5", []], "text 1: the prompt has no tokens"),
        (["w5", [96]], "text 1: token id 96 is not in the vocabulary of 96"),
        (["w5", 7], "text 1: a prompt is a text or a list of token ids, not a value of type int"),
        ({"a": 1}, "expected a text or a list of texts, not a value of type dict"),
    ],
    ids=str,
)
def test_what_is_no_text_is_named_by_its_index(texts: Any, message: str, opened: Any) -> None:
    model, _ = opened("BertForSequenceClassification", "BertConfig", SIZES)
    with Session(model) as session:
        for task in (session.embed, session.classify):
            with pytest.raises(errors.ConfigurationError, match=message):
                task(texts)
        assert session.embed([]).shape == (0, 0)
        assert session.classify([]) == []


def test_an_unknown_pooling_and_too_many_dimensions_are_refused(opened: Any) -> None:
    model, _ = opened(*ENCODERS[0])
    with Session(model) as session:
        with pytest.raises(errors.ConfigurationError, match="pooling='median': expected one of cls, max, mean"):
            session.embed("w5", pooling="median")
        with pytest.raises(errors.ConfigurationError, match="dimensions=33: the model's vectors have 32"):
            session.embed("w5", dimensions=33)
