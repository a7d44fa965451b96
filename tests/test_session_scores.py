"""Ranks, entities and likelihoods of many texts, as transformers computes them one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tasks import LONG, TEXTS, encoded, open_both
from test_tasks import HEADS, SIZES
from tiny import pieces_of_words
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from rabbit_engine import Session, errors

Opened = Callable[..., tuple[Any, Any]]
CROSS = ("BertForSequenceClassification", "BertConfig", {**SIZES, "num_labels": 1})
CAUSAL = ("Qwen3ForCausalLM", "Qwen3Config", {**SIZES, **HEADS})
NAMES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
TAGGERS = [
    ("BertForTokenClassification", "BertConfig", {**SIZES, "id2label": NAMES}),
    ("RobertaForTokenClassification", "RobertaConfig", {**SIZES, "id2label": NAMES}),
    ("Qwen3ForTokenClassification", "Qwen3Config", {**SIZES, **HEADS, "id2label": NAMES}),
]
NAMED = ["w5ab w6 w7c", "w9", "w10b w11 w12 w13ca w14 w15 w16abc w17"]


def subwords(**given: Any) -> Any:
    """A tokenizer of words that may end in pieces a, b and c."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    entries = [*specials, *(f"w{index}" for index in range(5, 60)), "##a", "##b", "##c"]
    backend = Tokenizer(WordPiece({name: index for index, name in enumerate(entries)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names, **given)


@pytest.fixture
def opened(tmp_path: Path, streamed: Any) -> Opened:
    """`opened(row, tokenizer)`: see `open_both`."""
    return lambda row, tokenizer=None: open_both(tmp_path, streamed, row, tokenizer=tokenizer)


def test_a_cross_encoder_scores_each_document_with_its_query(opened: Opened) -> None:
    model, oracle = opened(CROSS)
    with Session(model) as session:
        found, best = session.rerank("w60 w61", TEXTS), session.rerank("w60 w61", TEXTS, top=3)
        near = session.rerank("w60 w61", TEXTS, exact=False)
    pairs = [pieces_of_words(96)("w60 w61", text, return_tensors="pt") for text in TEXTS]
    with torch.no_grad():
        logits = [oracle(**pair).logits.item() for pair in pairs]
    assert [each.logit for each in found] == logits
    assert [each.score for each in found] == pytest.approx([torch.tensor(logit).sigmoid().item() for logit in logits])
    assert [each.index for each in best] == sorted(range(len(TEXTS)), key=lambda index: -logits[index])[:3]
    assert [each.logit for each in near] == pytest.approx(logits, abs=1e-5)


@pytest.mark.parametrize(
    "entry",
    [
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
    ],
    ids=str,
)
def test_scores_are_logits_where_sentence_transformers_says_so(entry: dict[str, Any], opened: Opened) -> None:
    model, _ = opened((*CROSS[:2], {**CROSS[2], **entry}))
    with Session(model) as session:
        (found,) = session.rerank("w60 w61", TEXTS[:1])
        (one,) = session.rerank("w60 w61", TEXTS[:1], activation="sigmoid")
    assert found.score == found.logit
    assert one.score == pytest.approx(torch.tensor(found.logit).sigmoid().item())


def test_a_causal_model_ranks_by_yes_and_no_in_the_template_of_qwen3_reranker(session: Session) -> None:
    model, documents = session.model, ["Paris is the capital of France.", "Bread is baked."]
    found = session.rerank("What is the capital of France?", documents)
    tokenizer: Any = model.tokenizer
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    after = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    task = "Given a web search query, retrieve relevant passages that answer the query"
    for each, document in zip(found, documents, strict=True):
        asked = f"<Instruct>: {task}\n<Query>: What is the capital of France?\n<Document>: {document}"
        ids = [token for part in (before, asked, after) for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            last = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()
        words = torch.stack([last[tokenizer.convert_tokens_to_ids(word)] for word in ("no", "yes")])
        assert each.score == pytest.approx(words.softmax(dim=0)[1].item(), abs=1e-6)


def test_what_cannot_rank_says_why(opened: Opened) -> None:
    model, _ = opened((*CROSS[:2], {**CROSS[2], "num_labels": 3}))
    with Session(model) as session:
        with pytest.raises(errors.WrongHeadError, match="the head has 3 labels, relevance has one"):
            session.rerank("w5", TEXTS)
        with pytest.raises(errors.ConfigurationError, match="takes no instruction"):
            session.rerank("w5", TEXTS, instruction="w6")
        with pytest.raises(errors.ConfigurationError, match="top=0"):
            session.rerank("w5", TEXTS, top=0)


def test_a_causal_model_without_the_tokens_of_the_template_cannot_rank(opened: Opened) -> None:
    model, _ = opened(CAUSAL)
    with Session(model) as session, pytest.raises(errors.WrongHeadError, match="whose tokens this one's tokenizer lacks"):
        session.rerank("w5", TEXTS)


@pytest.mark.parametrize("row", TAGGERS, ids=lambda row: row[0])
@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_entities_are_those_of_the_token_classification_pipeline(row: Any, aggregation: str, opened: Opened) -> None:
    model, oracle = opened(row, subwords())
    pipeline = transformers.pipeline("token-classification", model=oracle, tokenizer=subwords(), device="cpu")
    with Session(model) as session:
        found = session.tag(NAMED, aggregation=aggregation)
        assert session.tag(NAMED[0], aggregation=aggregation) == found[0]
        assert len(session.tag(NAMED[2], aggregation=aggregation, ignore=())) >= len(found[2])
    assert any(found)
    for text, entities in zip(NAMED, found, strict=True):
        expected = pipeline(text, aggregation_strategy=aggregation)
        names = ("score", "word", "start", "end")
        assert [[getattr(each, name) for name in names] for each in entities] == [[e[name] for name in names] for e in expected]
        assert [each.label for each in entities] == [e.get("entity_group", e.get("entity")) for e in expected]


def test_windows_of_a_long_text_have_the_entities_of_the_pipeline(opened: Opened) -> None:
    text = " ".join(f"w{5 + index % 50}{'abc'[index % 3]}" for index in range(40))
    tokenizer = subwords(model_max_length=32)
    model, oracle = opened(TAGGERS[0], tokenizer)
    pipeline = transformers.pipeline(
        "token-classification", model=oracle, tokenizer=tokenizer, device="cpu", stride=8, aggregation_strategy="simple"
    )
    with Session(model) as session:
        found = session.tag(text, stride=8)
        with pytest.raises(errors.PromptTooLongError, match="text 0: 82 tokens are more than the 32 that fit"):
            session.tag(text)
        with pytest.raises(errors.ConfigurationError, match='give aggregation="simple"'):
            session.tag(text, stride=8, aggregation="none")
        with pytest.raises(errors.ConfigurationError, match="aggregation='most': expected one of none, simple, first"):
            session.tag(text, aggregation="most")
    expected = pipeline(text)
    assert [(each.label, each.start, each.end) for each in found] == [(e["entity_group"], e["start"], e["end"]) for e in expected]
    assert [each.score for each in found] == pytest.approx([e["score"] for e in expected], abs=1e-5)


def own_logprobs(oracle: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = oracle(torch.tensor([ids[:-1]])).logits[0].float().log_softmax(dim=-1)
    return logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_the_likelihood_of_a_text_is_that_of_each_token_after_its_first(opened: Opened) -> None:
    model, oracle = opened(CAUSAL)
    with Session(model) as session:
        found, near = session.score(TEXTS), session.score(TEXTS, exact=False)
        one = session.score(TEXTS[2])
    for text, each, close in zip(TEXTS, found, near, strict=True):
        ids = encoded(text)["input_ids"]
        expected = own_logprobs(oracle, ids[0].tolist())
        with torch.no_grad():
            loss = oracle(ids, labels=ids).loss.item()
        assert list(each.token_logprobs) == expected.tolist()
        assert (each.logprob, each.tokens) == (expected.sum().item(), ids.shape[1] - 1)
        assert each.perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
        assert close.logprob == pytest.approx(each.logprob, abs=1e-4)
    assert one == found[2]


def test_continuations_are_scored_as_by_lm_evaluation_harness(opened: Opened) -> None:
    model, oracle = opened(CAUSAL)
    pairs = [("w5 w6 w7", " w8 w9"), ("w5 ", "w6"), ("w5 w6 w7", " w10")]
    with torch.no_grad():
        likeliest = int(oracle(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    with Session(model) as session:
        found = session.score([*pairs, ([5, 6, 7], [likeliest])], special_tokens=False)
        single = session.score(pairs[0], special_tokens=False)
    ids = [([5, 6, 7], [8, 9]), ([5], [6]), ([5, 6, 7], [10]), ([5, 6, 7], [likeliest])]
    for each, (context, rest) in zip(found, ids, strict=True):
        expected = own_logprobs(oracle, [*context, *rest])[-len(rest) :]
        assert each.logprob == pytest.approx(expected.sum().item(), abs=1e-5)
        assert each.tokens == len(rest)
    assert single == found[0]
    assert [each.is_greedy for each in found][2:] == [likeliest == 10, True]


def test_an_empty_context_is_the_first_special_token(opened: Opened) -> None:
    model, oracle = opened(CAUSAL, pieces_of_words(96, bos_token="w90"))
    with Session(model) as session:
        found = session.score(("", "w5 w6"), special_tokens=False)
    assert found.logprob == pytest.approx(own_logprobs(oracle, [90, 5, 6]).sum().item(), abs=1e-5)
    assert found.tokens == 2


def test_a_text_too_long_to_score_is_refused_or_loses_its_beginning(opened: Opened) -> None:
    sizes = {**CAUSAL[2], "max_position_embeddings": 16}
    model, oracle = opened((*CAUSAL[:2], sizes))
    ids = encoded(LONG, add_special_tokens=False)["input_ids"][0].tolist()
    with Session(model) as session:
        with pytest.raises(errors.PromptTooLongError, match="text 0: 59 tokens are more than the 16 that fit"):
            session.score([LONG], special_tokens=False)
        (found,) = session.score([LONG], special_tokens=False, truncation=True)
        for nothing in ("w5", ("w5", ""), []):
            with pytest.raises(errors.ConfigurationError, match="text 0: "):
                session.score([nothing], special_tokens=False)
    assert found.tokens == 16
    assert list(found.token_logprobs) == own_logprobs(oracle, ids[-17:]).tolist()


def test_a_model_without_a_causal_head_cannot_score(opened: Opened) -> None:
    model, _ = opened(CROSS)
    with Session(model) as session, pytest.raises(errors.WrongHeadError, match="its head computes labels of texts"):
        session.score("w5 w6")


def test_scores_of_a_real_model_are_those_of_its_logits(session: Session) -> None:
    model: Any = session.model
    texts = ["The capital of France is Paris.", "Paris capital the France of is."]
    found = session.score(texts)
    for text, each in zip(texts, found, strict=True):
        expected = own_logprobs(model, model.tokenizer(text)["input_ids"])
        assert list(each.token_logprobs) == expected.tolist()
    assert found[0].logprob > found[1].logprob + 10
    likely, unlikely = session.score([("The capital of France is", " Paris"), ("The capital of France is", " blue")])
    assert likely.logprob > unlikely.logprob + 5
    assert likely.is_greedy
    assert not unlikely.is_greedy
