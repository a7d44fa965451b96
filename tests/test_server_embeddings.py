"""Embeddings over HTTP are the pooled states of transformers' model; damaged pooling files are named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers
from openai.types import CreateEmbeddingResponse
from serving import HI, NAME, extras, post, serving
from talking import make_tokenizer

from rabbit_engine import Session, batch, errors
from rabbit_engine.tasks.embedding import Embedder
from rabbit_engine.tasks.sentence_files import find_embedder


@pytest.fixture
def embedding_folder(own_checkpoint: Any) -> Callable[..., Path]:
    def make(pooling: str, normalize: bool = True) -> Path:
        folder = own_checkpoint("qwen3")
        kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
        steps = [
            {"idx": index, "path": "" if index == 0 else f"{index}_{kind}", "type": f"sentence_transformers.models.{kind}"}
            for index, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(steps))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
        return folder

    return make


@pytest.mark.parametrize("pooling", ["lasttoken", "mean_tokens", "cls_token"])
def test_embeddings_of_a_model_that_embeds(
    embedding_folder: Any, streamed: Any, plain: Any, smollm_model: Any, pooling: str
) -> None:
    folder = embedding_folder(pooling)
    model = streamed(folder)

    class Words:
        """The tiny model has no words: 96 tokens, letters."""

        eos_token_id, pad_token_id, padding_side, chat_template = 2, 2, "left", None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

        def __len__(self) -> int:
            return 96

    model.tokenizer = Words()
    whole = plain(folder)
    texts = ["hello", "a longer text"]
    with Session(model) as session, serving(session) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found = client.embeddings.create(model=NAME, input=texts)  # base64, as the client asks by itself
        floats = client.embeddings.create(model=NAME, input=texts, encoding_format="float")
        short = client.embeddings.create(model=NAME, input=texts[0], dimensions=4).data[0].embedding
    assert found.usage.prompt_tokens == sum(map(len, texts))
    for text, one, other in zip(texts, found.data, floats.data, strict=True):
        with torch.no_grad():
            ids = torch.tensor([Words()(text)["input_ids"]])
            states = whole.model(ids).last_hidden_state[0]
        vector = {"lasttoken": states[-1], "mean_tokens": states.mean(0), "cls_token": states[0]}[pooling]
        expected = torch.nn.functional.normalize(vector, dim=0)
        assert one.embedding == other.embedding
        torch.testing.assert_close(torch.tensor(one.embedding), expected, rtol=0, atol=1e-6)
    assert len(short) == 4
    assert sum(value**2 for value in short) == pytest.approx(1, abs=1e-5)


def test_the_server_and_a_batch_embed_as_the_session_does(embedding_folder: Any, streamed: Any, tmp_path: Path) -> None:
    """With the checkpoint's default prompt, its longest text and its lower case."""
    folder = embedding_folder("mean_tokens", normalize=False)
    prompts = {"prompts": {"query": "Query:"}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    make_tokenizer().save_pretrained(folder)
    model, texts = streamed(folder), ["Hello", "longer", [5, 6]]
    asked = {"model": NAME, "input": texts[:2], "dimensions": 8}
    with Session(model) as session, serving(session) as url:
        bodies = [post(f"{url}/v1/embeddings", json=asked).json()]
        (ids,) = post(f"{url}/v1/embeddings", json={"model": NAME, "input": texts[2]}).json()["data"]
        long = post(f"{url}/v1/embeddings", json={"model": NAME, "input": "a" * 15})
        wide = post(f"{url}/v1/embeddings", json={"model": NAME, "input": "a", "dimensions": 999})
        expected, plain = session.embed(texts[:2], dimensions=8), session.embed(texts[:2], dimensions=8, prompt="")
        assert ids["embedding"] == session.embed(texts[2]).tolist()
        assert torch.equal(expected, session.embed(["query:hello", "query:longer"], dimensions=8, prompt=""))
    (tmp_path / "in.jsonl").write_text(json.dumps({"url": "/v1/embeddings", "body": asked}))
    batch(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", task="embed")
    bodies.append(json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"])
    assert not torch.equal(expected, plain)
    for body in bodies:
        assert [each["embedding"] for each in body["data"]] == expected.tolist()
        assert body["usage"]["prompt_tokens"] == 2 * len("query:") + len("hello") + len("longer")
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert (wide.status_code, wide.json()["error"]["param"]) == (400, "dimensions")


def test_texts_are_scored_by_the_similarity_of_their_vectors(embedding_folder: Any, streamed: Any) -> None:
    folder = embedding_folder("mean_tokens", normalize=False)
    make_tokenizer().save_pretrained(folder)
    texts = ["hello", "help", "xyz"]
    with Session(streamed(folder)) as session, serving(session) as url:
        vectors = session.embed(texts)
        expected = torch.cosine_similarity(vectors[:1], vectors[1:]).tolist()
        for asked in ({"text_1": texts[0], "text_2": texts[1:]}, {"queries": [texts[0]] * 2, "documents": texts[1:]}):
            found = post(f"{url}/v1/score", json=asked).json()
            assert [each["score"] for each in found["data"]] == expected
            assert [each["index"] for each in found["data"]] == [0, 1]
            assert found["usage"]["total_tokens"] == sum(map(len, texts))  # each text once
        same = post(f"{url}/score", json={"text_1": "abc", "text_2": "abc"}).json()
        assert same["data"][0]["score"] == pytest.approx(1, abs=1e-5)
        refused = post(f"{url}/v1/score", json={"text_1": "a", "text_2": "b", "activation": "sigmoid"})
        assert (refused.status_code, "takes no activation" in refused.text) == (400, True)
    assert expected[0] != expected[1]


def test_unknown_ways_of_embedding_are_reported(embedding_folder: Any) -> None:
    folder = embedding_folder("median_tokens")
    with pytest.raises(errors.ConfigurationError, match="median"):
        find_embedder(folder)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    assert find_embedder(folder) == Embedder(("mean",), True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": ["mean", "cls"], "include_prompt": false}')
    assert find_embedder(folder) == Embedder(("mean", "cls"), True, counts_prompt=False)
    (folder / "modules.json").unlink()
    assert find_embedder(folder) is None


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json"])
@pytest.mark.parametrize(
    "text", ['{"a"', "[1]", '"x"', "\x00", "[" * 100_000, '[{"type": 5}]', '{"pooling_mode_mean_tokens": 1}', "\xff"]
)
def test_damaged_files_of_embedding_are_named(name: str, text: str, embedding_folder: Any) -> None:
    folder = embedding_folder("mean_tokens")
    assert find_embedder(folder) == Embedder(("mean",), True)
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(errors.DamagedCheckpointError, match=re.escape(str(folder / name))):
        find_embedder(folder)


def test_pooling_outside_of_the_checkpoint_is_refused(embedding_folder: Any) -> None:
    folder = embedding_folder("mean_tokens")
    (folder / "modules.json").write_text('[{"type": "a.Pooling", "path": "../other"}]')
    with pytest.raises(errors.DamagedCheckpointError, match=r"'../other' leads outside"):
        find_embedder(folder)


def test_a_model_that_only_embeds_is_served(own_checkpoint: Any, streamed: Any, smollm_model: Any) -> None:
    """Of a class without a head, as many checkpoints of sentence-transformers are; it cannot chat, and says so."""
    folder = own_checkpoint("qwen3")
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)  # the class without a head
    assert "lm_head" not in (folder / "config.json").read_text()
    kinds = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    model = streamed(folder)
    model.tokenizer = smollm_model.tokenizer
    assert type(model).__name__ == "Qwen3Model"
    with Session(model) as session, serving(session) as url:
        answer = post(f"{url}/v1/embeddings", json={"model": NAME, "input": [[5, 6, 7]]}).json()
        chat = post(f"{url}/v1/chat/completions", json=HI)
    with torch.no_grad():
        whole = transformers.AutoModel.from_pretrained(folder)(torch.tensor([[5, 6, 7]])).last_hidden_state[0].mean(0)
    found = CreateEmbeddingResponse.model_validate(answer, strict=True)
    assert not [*extras(found)]
    torch.testing.assert_close(torch.tensor(found.data[0].embedding), whole, rtol=0, atol=1e-6)
    assert chat.status_code == 400
    assert "does not generate" in chat.json()["error"]["message"]
