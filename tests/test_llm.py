"""`LLM` gives what a session gives, under vLLM's names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tasks import open_both

from rabbit_engine import LLM, Options, SamplingParams, Session, errors


@pytest.fixture(scope="module")
def llm(smollm_model: Any) -> Any:
    with LLM(smollm_model, max_requests=8) as llm:
        yield llm


def test_prompts_are_continued_as_by_a_session(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    first, second = llm.generate(["The sea is", {"prompt": "Two and two is"}], params)
    replies = llm.session.generate(["The sea is", "Two and two is"], max_new_tokens=4, temperature=0)
    for output, reply in zip((first, second), replies, strict=True):
        assert (output.outputs[0].text, output.outputs[0].token_ids) == (reply.text, list(reply.tokens))
        assert (output.outputs[0].finish_reason, output.finished) == ("length", True)
    assert (first.prompt, first.prompt_token_ids) == ("The sea is", llm.get_tokenizer()("The sea is")["input_ids"])
    (of_ids,) = llm.generate({"prompt_token_ids": first.prompt_token_ids}, params)
    assert of_ids.outputs == first.outputs
    assert [output.request_id for output in (first, second, of_ids)] == ["0", "1", "2"]


def test_sampling_parameters_are_read_by_attribute(llm: LLM) -> None:
    own = SamplingParams(temperature=0.8, top_k=-1, seed=3, max_tokens=4, n=2, logprobs=2)
    foreign = SimpleNamespace(**{name: getattr(own, name) for name in SamplingParams.__slots__}, output_kind="final")
    (found,), (same,) = llm.generate("The sea is", own), llm.generate("The sea is", foreign)
    assert [output.text for output in found.outputs] == [output.text for output in same.outputs]
    options = {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_new_tokens": 4, "logprobs": 2}
    replies = [llm.session.generate("The sea is", seed=3 + index, **options)[0] for index in range(2)]
    assert [output.token_ids for output in found.outputs] == [list(reply.tokens) for reply in replies]
    best, reply = found.outputs[0], replies[0]
    assert best.cumulative_logprob == sum(each.logprob for each in reply.logprobs or ())
    assert best.logprobs[0][reply.tokens[0]].logprob == reply.logprobs[0].logprob
    (plain,) = llm.generate("The sea is", Options(max_new_tokens=2, temperature=0))
    (mapped,) = llm.generate("The sea is", {"max_tokens": 2, "temperature": 0})
    assert plain.outputs == mapped.outputs


def test_conversations_are_answered_one_or_many(llm: LLM) -> None:
    hi = [{"role": "user", "content": "Name three colours."}]
    params = [SamplingParams(temperature=0, max_tokens=3), SamplingParams(temperature=0, max_tokens=5)]
    one = llm.chat(hi, params[1])
    many = llm.chat([hi, hi], params)
    assert one[0].outputs[0].text == llm.session.chat(hi, max_new_tokens=5, temperature=0).text
    assert [len(output.outputs[0].token_ids) for output in many] == [3, 5]
    assert "Name three colours." in one[0].prompt


def test_texts_are_embedded_classified_and_scored_as_by_a_session(streamed: Any, tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2}
    for labels in (3, 1):
        row = ("DistilBertForSequenceClassification", "DistilBertConfig", {**sizes, "num_labels": labels})
        model, _ = open_both(tmp_path / str(labels), streamed, row)
        with LLM(model) as llm, Session(model) as session:
            vectors = [each.outputs.embedding for each in llm.embed(["w5 w6", "w7"])]
            assert vectors == session.embed(["w5 w6", "w7"]).tolist()
            classified = llm.classify("w5 w6")[0].outputs
            expected = session.classify("w5 w6")
            assert (len(classified.probs), max(classified.probs), classified.label) == (labels, expected.score, expected.label)
    with LLM(model) as llm, Session(model) as session:
        ranked = [each.score for each in session.rerank("w5", ["w6", "w7 w8"])]
        assert [each.outputs.score for each in llm.score("w5", ["w6", "w7 w8"])] == ranked
        assert [each.outputs.score for each in llm.score(["w5", "w5"], ["w6", "w7 w8"])] == ranked
        with pytest.raises(errors.ConfigurationError, match="2 texts and 1"):
            llm.score(["w5", "w6"], "w7")


def test_a_model_that_it_loaded_is_closed_with_it(checkpoint: Any) -> None:
    with LLM(checkpoint("llama"), device="cpu") as llm:
        model = llm.model
    with pytest.raises(errors.ModelClosedError):
        model(torch.tensor([[3, 4]]))


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs=1 is not supported"),
        ({"n": 0.5}, "n=0.5"),
        ({"max_token": 3}, "max_token"),
        (7, "expected SamplingParams or Options, not a value of type int"),
        ([SamplingParams()] * 3, "3 sampling parameters for 2 prompts"),
    ],
)
def test_parameters_that_cannot_be_kept_are_refused(llm: LLM, params: Any, told: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=told):
        llm.generate(["a", "b"], params)
    with pytest.raises(errors.ConfigurationError, match="has no effect"):
        LLM(llm.model, device="cpu")
