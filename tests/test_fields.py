"""Fields of requests: those that change an answer are honoured or refused by name, none is dropped without a word."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import talking
import transformers
from fastapi.testclient import TestClient

from rabbit_engine import AutoModel, Session
from rabbit_engine.server.app import create_app
from rabbit_engine.server.openai import fields
from rabbit_engine.server.openai.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from rabbit_engine.server.responses.schema import ResponseRequest
from rabbit_engine.server.tasks.schema import ClassifyRequest, RerankRequest, ScoreRequest

TALK = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "xy"}]
DOCS = Path(__file__).parents[1] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = talking.save(tmp_path_factory.mktemp("talking"))
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def client(model: Any) -> Iterator[TestClient]:
    with Session(model) as session, TestClient(create_app(session, "mine"), base_url="http://localhost") as client:
        yield client


def chat(client: TestClient, **more: Any) -> Any:
    body = {"model": "mine", "messages": TALK, "max_tokens": 6, "temperature": 0, **more}
    return client.post("/v1/chat/completions", json=body)


def text_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def plain(client: TestClient) -> str:
    return text_of(chat(client))


def test_a_final_message_is_continued(client: TestClient, model: Any) -> None:
    ids = model.tokenizer.apply_chat_template(TALK, continue_final_message=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    found = chat(client, continue_final_message=True, add_generation_prompt=False)
    assert text_of(found) == text_of(chat(client, continue_final_message=True)) == model.tokenizer.decode(expected)
    assert found.json()["usage"]["prompt_tokens"] == ids["input_ids"].shape[1]
    assert chat(client, continue_final_message=True, add_generation_prompt=True).status_code == 400


def test_stop_tokens_bad_words_and_the_rest_change_the_answer(client: TestClient, plain: str, model: Any) -> None:
    token = ord(plain[1]) - 31
    assert text_of(chat(client, stop_token_ids=[token])) == plain[:1]
    assert text_of(chat(client, stop_token_ids=[token], include_stop_str_in_output=True)) == plain[:2]
    assert text_of(chat(client, stop=plain[1], include_stop_str_in_output=True)) == plain[:2]
    assert plain[0] not in text_of(chat(client, bad_words=[plain[0]]))
    end = {str(talking.END): 100}
    assert chat(client, logit_bias=end).json()["usage"]["completion_tokens"] == 1
    assert chat(client, logit_bias=end, min_tokens=3).json()["usage"]["completion_tokens"] == 4
    assert chat(client, logit_bias=end, ignore_eos=True).json()["usage"]["completion_tokens"] == 6
    assert text_of(chat(client, logit_bias=end, skip_special_tokens=False)) == "</s>"
    assert len(set(text_of(chat(client, no_repeat_ngram_size=1)))) == 6
    drawn = {"temperature": 3.0, "seed": 1, "max_tokens": 12}
    assert text_of(chat(client, **drawn)) != text_of(chat(client, **drawn, typical_p=0.2))
    assert text_of(chat(client, **drawn)) != text_of(chat(client, **drawn, epsilon_cutoff=0.1))


def test_fields_of_a_generation_config_do_so_too(client: TestClient, plain: str) -> None:
    config = {"do_sample": False, "max_new_tokens": 6, "stop_strings": plain[1], "num_beams": 1, "eos_token_id": 5}
    body = {"model": "mine", "messages": TALK}
    found = client.post("/v1/chat/completions", json={**body, "generation_config": json.dumps(config)})
    assert text_of(found) == plain[:2]
    refused = client.post("/v1/chat/completions", json={**body, "generation_config": {"num_beams": 4}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "generation_config.num_beams")


def with_config(client: TestClient, config: Any, **more: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "mine", "messages": TALK, "generation_config": config, **more})


@pytest.mark.parametrize(
    ("config", "param", "says"),
    [
        ({"max_new_tokens": "2"}, "max_new_tokens", "valid integer"),
        ({"max_new_tokens": 2.0}, "max_new_tokens", "valid integer"),
        ({"max_new_tokens": [1]}, "max_new_tokens", "valid integer"),
        ({"do_sample": "false"}, "do_sample", "valid boolean"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size", "valid integer"),
        ({"temperature": True, "do_sample": True}, "temperature", "valid number"),
        ({"stop_strings": 5}, "stop_strings", "valid list"),
        ({"min_new_tokens": 5, "max_new_tokens": 3}, "min_new_tokens", "generation_config.max_new_tokens=3"),
        ({"temprature": 2}, "temprature", "did you mean 'temperature'"),
        ({"max_new_token": 2}, "max_new_token", "did you mean 'max_new_tokens'"),
        ({"max_length": 8}, "max_length", "use max_tokens"),
        ({"forced_bos_token_id": 0}, "forced_bos_token_id", "response_format"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size", "sampler"),
        ({"n": 2}, "n", "a field of the request itself"),
        ({"stop": "x"}, "stop", "a field of the request itself"),
    ],
)
def test_an_invalid_generation_config_field_is_refused_with_its_place(
    client: TestClient, config: dict[str, Any], param: str, says: str
) -> None:
    for sent in (config, json.dumps(config)):
        error = with_config(client, sent)
        assert error.status_code == 400
        assert error.json()["error"]["param"] == f"generation_config.{param}"
        assert says in error.json()["error"]["message"]


def test_penalties_and_a_seed_count_in_a_generation_config(client: TestClient) -> None:
    config = {"do_sample": False, "max_new_tokens": 12}
    greedy = text_of(with_config(client, config))
    penal = text_of(with_config(client, {**config, "frequency_penalty": 2, "presence_penalty": 2}))
    assert penal == text_of(with_config(client, config, frequency_penalty=2, presence_penalty=2)) != greedy
    drawn = {"do_sample": True, "max_new_tokens": 12, "temperature": 3.0, "seed": 5}
    assert text_of(with_config(client, drawn)) == text_of(chat(client, max_tokens=12, temperature=3.0, seed=5)) != greedy


@pytest.mark.parametrize("whole", [False, True])
def test_the_whole_config_that_transformers_sends_is_taken(client: TestClient, plain: str, whole: bool) -> None:
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=5, pad_token_id=0, use_cache=True)
    assert text_of(with_config(client, config.to_json_string(use_diff=not whole))) == plain[:4]
    defaults = {"max_length": 20, "top_k": 50, "num_beams": 1, "length_penalty": 1.0, "typical_p": 1.0, "early_stopping": False}
    assert text_of(with_config(client, {**config.to_dict(), **defaults})) == plain[:4]


@pytest.mark.parametrize("config", [5, "5", "x", [], True])
def test_a_generation_config_of_another_type_is_named(client: TestClient, config: Any) -> None:
    error = with_config(client, config)
    assert (error.status_code, error.json()["error"]["param"]) == (400, "generation_config")


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"max_tokens": 3_000_000_000}, "max_tokens", "2147483648"),
        ({"min_tokens": 3_000_000_000}, "min_tokens", "2147483648"),
        ({"min_tokens": 7}, "min_tokens", "more than max_tokens=6"),
        ({"min_tokens": 7, "max_completion_tokens": 5}, "min_tokens", "more than max_completion_tokens=5"),
        ({"stop_token_ids": [5000]}, "stop_token_ids", "5000"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages", "Extra"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "boolean"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"tools": ["f"]}, "tools.0", "function"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "function"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}, {"name": "g"}]}, "tools.1.function.name", "needs a name"),
        ({"tools": [{"function": {"name": ""}}]}, "tools.0.function.name", "needs a name"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_the_clients_own_name(
    client: TestClient, asked: dict[str, Any], param: str, says: str
) -> None:
    error = chat(client, **asked)
    assert error.status_code == 400
    assert error.json()["error"]["param"] == param
    assert says in error.json()["error"]["message"]


def test_refused_fields_are_accepted_with_values_of_no_effect(client: TestClient, plain: str) -> None:
    assert text_of(chat(client, top_logprobs=0, tools=None, stream_options={"include_obfuscation": False})) == plain
    assert text_of(chat(client, tools=[{"function": {"name": "f"}}])) == plain
    completion = {"model": "mine", "prompt": "abc", "max_tokens": 2}
    for logprobs, told in ((False, False), (None, False), (0, True)):
        answer = client.post("/v1/completions", json={**completion, "logprobs": logprobs}).json()
        assert (answer["choices"][0]["logprobs"] is not None) is told


@pytest.mark.parametrize("name", sorted(fields.FALSE_ASKS))
def test_a_feature_that_is_on_by_default_is_not_switched_off_silently(client: TestClient, name: str) -> None:
    assert chat(client, **{name: False}).json()["error"]["param"] == name


def test_a_message_that_says_nothing_is_refused_with_its_place(client: TestClient) -> None:
    error = chat(client, messages=[*TALK, {"role": "user", "contents": "abc"}])
    assert (error.status_code, error.json()["error"]["param"]) == (400, "messages.2.contents")


WANTED: dict[str, Any] = {
    "modalities": ["text", "audio"],
    "detokenize": None,
    "spaces_between_special_tokens": None,
    "include_reasoning": None,
    "truncation": "auto",
    "function_call": {"name": "f"},
}


@pytest.mark.parametrize("name", fields.REFUSED)
def test_unsupported_fields_are_refused_by_name_and_reason(client: TestClient, plain: str, name: str) -> None:
    why, neutral = fields.REFUSED[name]
    wanted = WANTED.get(name, 7)
    if wanted is not None:
        error = chat(client, **{name: wanted})
        assert error.status_code == 400
        assert error.json()["error"]["param"] == name
        assert why in error.json()["error"]["message"]
    for value in (None, *neutral[:1]):
        fields.check_fields({name: value}, (), {})


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("max_completion_token", "max_completion_tokens"),
        ("maxTokens", "max_tokens"),
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("top-p", "top_p"),
        ("topK", "top_k"),
        ("stops", "stop"),
        ("streaming", "stream"),
        ("repitition_penalty", "repetition_penalty"),
        ("frequence_penalty", "frequency_penalty"),
        ("tool_choices", "tool_choice"),
        ("responseFormat", "response_format"),
        ("guided_jsn", "guided_json"),
        ("logit_biases", "logit_bias"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_one_that_was_meant(client: TestClient, misspelt: str, meant: str) -> None:
    error = chat(client, **{misspelt: 1})
    assert error.status_code == 400
    assert error.json()["error"]["param"] == misspelt
    assert f"did you mean '{meant}'" in error.json()["error"]["message"]


def test_a_field_of_another_kind_of_request_is_refused(client: TestClient) -> None:
    assert "/v1/completions" in chat(client, prompt="abc").json()["error"]["message"]
    asked = {"model": "mine", "prompt": "abc", "max_tokens": 1}
    assert client.post("/v1/completions", json={**asked, "top_logprobs": 2}).json()["error"]["param"] == "top_logprobs"
    assert client.post("/v1/completions", json={**asked, "tools": []}).status_code == 200
    inputs = {"model": "mine", "input": "abc"}
    assert client.post("/v1/embeddings", json={**inputs, "temprature": 1}).json()["error"]["param"] == "temprature"


def test_an_unknown_field_is_logged_once_with_the_nearest_and_answered(client: TestClient, plain: str, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="rabbit_engine.server.openai.fields"):
        assert text_of(chat(client, qwertz=1)) == text_of(chat(client, qwertz=2)) == plain
    assert caplog.text.count("'qwertz'") == 1
    assert "nearest known one" in caplog.text


def test_unknown_fields_without_end_are_refused_not_compared(client: TestClient) -> None:
    error = chat(client, **{f"x{index}": 1 for index in range(5_000)})
    assert error.status_code == 400
    assert "5000 unknown fields" in error.json()["error"]["message"]


def test_fields_that_change_nothing_are_ignored(client: TestClient, plain: str) -> None:
    assert text_of(chat(client, **dict.fromkeys(fields.IGNORED, "x"))) == plain


def test_a_variable_that_the_template_does_not_read_is_refused_or_warned_about(
    client: TestClient, plain: str, caplog: Any
) -> None:
    assert chat(client, reasoning_effort="high").json()["error"]["param"] == "reasoning_effort"
    assert chat(client, chat_template_kwargs={"temprature": 1}).status_code == 400
    assert text_of(chat(client, chat_template_kwargs={"enable_thinking": False})) == plain
    assert "enable_thinking" in caplog.text


def test_special_tokens_of_a_completion_can_be_left_out(client: TestClient, model: Any, monkeypatch: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    monkeypatch.setattr(
        model.tokenizer.backend_tokenizer, "post_processor", TemplateProcessing("<s> $A", None, [("<s>", talking.BOS)])
    )
    asked = {"model": "mine", "prompt": "abc", "max_tokens": 1}
    for special, tokens in ((True, 4), (False, 3)):
        found = client.post("/v1/completions", json={**asked, "add_special_tokens": special}).json()
        assert found["usage"]["prompt_tokens"] == tokens


KINDS = (ChatRequest, CompletionRequest, EmbeddingRequest, ResponseRequest, RerankRequest, ScoreRequest, ClassifyRequest)


def test_the_page_names_every_field() -> None:
    page = DOCS.read_text("utf-8")
    honoured = {name for kind in KINDS for name in kind.model_fields}
    missing = {name for name in (*honoured, *fields.REFUSED, *fields.IGNORED) if f"`{name}`" not in page}
    assert not missing
