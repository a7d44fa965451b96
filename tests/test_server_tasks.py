"""Labels, ranks and scores over HTTP are those of the session, in the forms of vLLM's, Jina's and Cohere's servers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from serving import NAME, get, post, serving
from tasks import open_both

from rabbit_engine import Session

DISTILBERT = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2}
DOCUMENTS: list[Any] = ["w6 w7", {"text": "w8"}, "w9 w10 w11"]
TEXTS = ["w6 w7", "w8", "w9 w10 w11"]


@contextmanager
def served(folder: Path, streamed: Any, labels: int) -> Iterator[tuple[Session, str]]:
    """A classifier of texts in the smallest budget, and its server."""
    sizes = {**DISTILBERT, "num_labels": labels}
    model, _ = open_both(folder, streamed, ("DistilBertForSequenceClassification", "DistilBertConfig", sizes))
    with Session(model) as session, serving(session) as url:
        yield session, url


def asked(url: str, path: str, **body: Any) -> Any:
    answer = post(f"{url}{path}", json={"model": NAME, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_documents_are_ranked_as_by_the_session(streamed: Any, tmp_path: Path) -> None:
    with served(tmp_path, streamed, 1) as (session, url):
        expected = [(each.index, each.score) for each in session.rerank("w5", TEXTS, top=3)]
        for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
            found = asked(url, path, query="w5", documents=DOCUMENTS)
            assert [(each["index"], each["relevance_score"]) for each in found["results"]] == expected
            assert found["usage"]["total_tokens"] > 6
            shown = [each.get("document", {}).get("text") for each in found["results"]]
            assert shown == [None if path == "/v2/rerank" else TEXTS[index] for index, _ in expected]
        best = asked(url, "/v1/rerank", query="w5", documents=DOCUMENTS, top_n=1, return_documents=False)["results"]
        assert best == [{"index": expected[0][0], "relevance_score": expected[0][1]}]
        logits = {each.index: each.logit for each in session.rerank("w5", TEXTS)}
        for activation in ({"activation": "none"}, {"use_activation": False}):
            raw = asked(url, "/rerank", query="w5", documents=DOCUMENTS, **activation)["results"]
            assert {each["index"]: each["relevance_score"] for each in raw} == logits


def test_pairs_are_scored_as_by_the_session(streamed: Any, tmp_path: Path) -> None:
    with served(tmp_path, streamed, 1) as (session, url):
        one = [each.score for each in session.rerank("w5", TEXTS)]
        each_own = [session.rerank(query, [text])[0].score for query, text in zip(["w1", "w2", "w3"], TEXTS, strict=True)]
        for path, texts in (("/score", ("text_1", "text_2")), ("/v1/score", ("queries", "documents"))):
            data = asked(url, path, **dict(zip(texts, ("w5", DOCUMENTS), strict=True)))["data"]
            assert [(each["index"], each["score"]) for each in data] == list(enumerate(one))
            data = asked(url, path, **dict(zip(texts, (["w1", "w2", "w3"], TEXTS), strict=True)))["data"]
            assert [each["score"] for each in data] == each_own
        for wrong in ({"text_1": ["a", "b"], "text_2": TEXTS}, {"text_1": "a"}, {"text_1": "a", "text_2": "b", "input": "c"}, {}):
            assert post(f"{url}/score", json={"model": NAME, **wrong}).status_code == 400


def test_labels_are_those_of_the_session(streamed: Any, tmp_path: Path) -> None:
    with served(tmp_path, streamed, 3) as (session, url):
        expected = session.classify(TEXTS)
        for path in ("/v1/classify", "/classify"):
            data = asked(url, path, input=TEXTS)["data"]
            assert [(each["label"], each["num_classes"]) for each in data] == [(each.label, 3) for each in expected]
            for each, wanted in zip(data, expected, strict=True):
                probabilities = {pair.label: pair.score for pair in wanted.scores}
                assert each["probs"] == [probabilities[f"LABEL_{index}"] for index in range(3)]
        assert "3 labels" in post(f"{url}/v1/rerank", json={"model": NAME, "query": "a", "documents": ["b"]}).text
        assert "has no head for the next token" in post(f"{url}/v1/score", json={"model": NAME, "input": "w5"}).text


def test_likelihoods_are_those_of_the_session(url: str, session: Session) -> None:
    pairs = [["The capital of France is", " Paris"], "One two three"]
    expected = session.score([("The capital of France is", " Paris"), "One two three"])
    data = asked(url, "/v1/score", input=pairs)["data"]
    assert [(each["logprob"], each["is_greedy"]) for each in data] == [(each.logprob, each.is_greedy) for each in expected]
    for path, body in (("classify", {"input": "a"}), ("rerank", {"query": "a", "documents": []})):
        assert post(f"{url}/v1/{path}", json={"model": NAME, **body}).status_code == 400
    refused = post(f"{url}/classify", json={"model": NAME, "input": "a"}).json()
    assert "its head computes the next token" in refused["error"]["message"] == refused["message"]


def test_the_server_answers_others_while_it_ranks(streamed: Any, tmp_path: Path) -> None:
    """The event loop does not wait for the session."""
    with served(tmp_path, streamed, 1) as (session, url):
        may_go = threading.Event()
        session.call([(may_go.wait, 1)])

        async def ask() -> tuple[int, int]:
            async with httpx.AsyncClient(timeout=30) as client:
                body = {"model": NAME, "query": "w5", "documents": TEXTS}
                waiting = [asyncio.create_task(client.post(f"{url}/rerank", json=body)) for _ in range(20)]
                await asyncio.sleep(0.2)
                health = (await client.get(f"{url}/health")).status_code
                assert not any(task.done() for task in waiting)
                may_go.set()
                return health, [answer.status_code for answer in await asyncio.gather(*waiting)].count(200)

        try:
            assert asyncio.run(ask()) == (200, 20)
        finally:
            may_go.set()
        assert get(f"{url}/health").status_code == 200
