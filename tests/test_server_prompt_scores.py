"""Log probabilities of prompts over HTTP are those of the session, as lm-evaluation-harness and vLLM's clients ask for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import NAME, post

from rabbit_engine import Session, batch

TEXT = "The capital of France is Paris."


@pytest.mark.parametrize("most", [0, 1])
def test_an_echo_has_the_log_probabilities_of_its_prompt(client: openai.OpenAI, session: Session, most: int) -> None:
    ids = session.encode(TEXT)
    expected = session.score([ids], special_tokens=False)[0]
    for prompt in (TEXT, ids):
        found = client.completions.create(model=NAME, prompt=prompt, echo=True, logprobs=1, max_tokens=most, temperature=0)
        told = found.choices[0].logprobs
        assert told is not None
        assert told.token_logprobs is not None
        assert told.top_logprobs is not None
        assert told.token_logprobs[: len(ids)] == [None, *expected.token_logprobs]
        assert len(told.token_logprobs) == len(told.tokens or ()) == len(ids) + most
        assert "".join((told.tokens or [])[: len(ids)]) == TEXT
        assert (found.choices[0].text.startswith(TEXT), found.choices[0].finish_reason) == (True, "length")
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), most)
        best = [max(top.values()) == own for top, own in zip(told.top_logprobs[1:], told.token_logprobs[1:], strict=True)]
        assert all(best[: len(ids) - 1]) == expected.is_greedy
        assert told.text_offset == [len("".join((told.tokens or [])[:index])) for index in range(len(ids) + most)]


@pytest.mark.parametrize("most", [0, 3])
def test_a_streamed_echo_adds_up_to_the_whole_one(client: openai.OpenAI, most: int) -> None:
    asked: Any = {"model": NAME, "prompt": [TEXT, "Hi"], "echo": True, "logprobs": 1, "max_tokens": most, "temperature": 0}
    whole = client.completions.create(**asked)
    *chunks, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole.usage
    for choice in whole.choices:
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert (parts[0].text, parts[-1].finish_reason) == (asked["prompt"][choice.index], choice.finish_reason)
        told = [part.logprobs for part in parts if part.logprobs is not None]
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for one in told for value in getattr(one, name)] == getattr(choice.logprobs, name), name


def test_a_stream_shows_that_it_lives_while_its_prompt_is_scored(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rabbit_engine.server.streams.SILENCE_S", 0.001)
    body = {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 0, "stream": True}
    text = post(f"{url}/v1/completions", json=body).text
    assert text.startswith(": ")
    assert text.endswith("data: [DONE]\n\n")
    assert json.loads(text[text.index("data: ") + 6 :].partition("\n")[0])["choices"][0]["text"] == TEXT


def test_prompts_are_scored_in_vllms_form(url: str, session: Session) -> None:
    prompts = [session.encode(TEXT), [5]]
    body = {"model": NAME, "prompt": prompts, "prompt_logprobs": 2, "max_tokens": 1, "n": 2, "seed": 1}
    choices = post(f"{url}/v1/completions", json=body).json()["choices"]
    expected = session.score([prompts[0]], special_tokens=False)[0].token_logprobs
    for choice in choices[:2]:
        first, *rest = choice["prompt_logprobs"]
        assert first is None
        for token, logprob, told in zip(prompts[0][1:], expected, rest, strict=True):
            assert told[str(token)]["logprob"] == logprob
            ranked = sorted(told.values(), key=lambda each: each["rank"])
            assert [each["rank"] for each in ranked[:2]] == [1, 2]
            assert [each["logprob"] for each in ranked] == sorted((each["logprob"] for each in ranked), reverse=True)
    assert [choice["prompt_logprobs"] for choice in choices[2:]] == [[None], [None]]
    assert choices[0]["logprobs"] is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "stream"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_what_has_no_scores_is_refused(url: str, body: Any, param: str) -> None:
    answer = post(f"{url}/v1/completions", json={"model": NAME, "prompt": TEXT, **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_echo_alone_computes_nothing(url: str) -> None:
    body = {"model": NAME, "prompt": TEXT, "echo": True, "max_tokens": 0}
    choice = post(f"{url}/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]) == (TEXT, None)


def test_a_batch_names_its_own_way_to_score(smollm_model: Any, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 1}))
    batch(smollm_model, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert "/v1/score" in (tmp_path / "out.jsonl").read_text()


def test_texts_and_conversations_are_tokenised_and_back(url: str, session: Session) -> None:
    found = post(f"{url}/tokenize", json={"model": NAME, "prompt": TEXT}).json()
    assert (found["tokens"], found["count"]) == (session.encode(TEXT), len(found["tokens"]))
    assert found["max_model_len"] == session.most_tokens
    assert post(f"{url}/detokenize", json={"model": NAME, "tokens": found["tokens"]}).json() == {"prompt": TEXT}
    talk = [{"role": "user", "content": "Hi"}]
    ids = post(f"{url}/tokenize", json={"model": NAME, "messages": talk}).json()["tokens"]
    assert ids == list(session.request(talk).prompt.ids)
    assert post(f"{url}/detokenize", json={"model": NAME, "tokens": [10**9]}).status_code == 400
