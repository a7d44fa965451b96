"""What Ollama's API refuses, ignores and reads, and that nothing a client sends is an error of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import talking
from odd import odd_requests
from serving import NAME, serving

from rabbit_engine import AutoModel, Session

HI = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
ALL_OPTIONS = {
    "num_keep": 5,
    "seed": 42,
    "num_predict": 3,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 0.7,
    "repeat_last_n": 64,
    "temperature": 0.8,
    "repeat_penalty": 1.2,
    "presence_penalty": 1.5,
    "frequency_penalty": 1.0,
    "mirostat": 0,
    "mirostat_tau": 0.8,
    "mirostat_eta": 0.6,
    "penalize_newline": True,
    "stop": ["~"],
    "numa": False,
    "num_ctx": 1024,
    "num_batch": 2,
    "num_gpu": 1,
    "main_gpu": 0,
    "low_vram": False,
    "vocab_only": False,
    "use_mmap": True,
    "use_mlock": False,
    "num_thread": 8,
}
"""Every option of Ollama's documentation."""


def as_embedder(folder: Path) -> Path:
    """The folder with the files of sentence-transformers."""
    steps = [{"path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"} for path in ("", "1_Pooling")]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """The tiny model that has words, and embeds them too."""
    folder = as_embedder(talking.save(tmp_path_factory.mktemp("talking")))
    with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model, max_new_tokens=3) as session:
        yield session


@pytest.fixture(scope="module")
def address(tiny: Session) -> Iterator[str]:
    with serving(tiny) as url:
        yield url


def ask(address: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{address}/api/{path}", json={"model": NAME, "stream": False, **body}, timeout=60)


BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        "chat",
        {
            **HI,
            "stream": False,
            "keep_alive": "5m",
            "think": None,
            "format": "",
            "logprobs": True,
            "top_logprobs": 2,
            "options": {"num_predict": 2, "temperature": 0.5, "seed": 1, "stop": ["~"], "num_ctx": 64, "top_k": 3},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        },
    ),
    (
        "chat",
        {
            "model": NAME,
            "options": {"num_predict": 1},
            "messages": [
                {"role": "user", "content": "Hi", "images": []},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
                {"role": "tool", "content": "5", "tool_name": "f"},
            ],
        },
    ),
    (
        "generate",
        {
            "model": NAME,
            "prompt": "Hi",
            "system": "Be",
            "raw": False,
            "context": [5, 6],
            "stream": True,
            "suffix": "",
            "options": {"num_predict": 2, "repeat_penalty": 1.1, "repeat_last_n": 64, "mirostat": 0, "min_p": 0.1},
        },
    ),
    ("embed", {"model": NAME, "input": ["a", "b"], "truncate": True, "dimensions": 4, "keep_alive": -1, "options": {}}),
    ("embeddings", {"model": NAME, "prompt": "a"}),
    ("show", {"model": NAME, "verbose": True, "name": NAME}),
]


def send_odd(address: str, count: int, seed: int) -> dict[int, int]:
    """How many answers had which status; every error is in Ollama's form."""
    found: dict[int, int] = {}
    with httpx.Client(base_url=address, timeout=60) as client:
        for path, content in odd_requests(BODIES, count, seed):
            answer = client.post(f"/api/{path}", content=content, headers={"Content-Type": "application/json"})
            found[answer.status_code] = found.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (path, content[:300], answer.text)
            if answer.status_code != 200:
                assert isinstance(answer.json()["error"], str)
            else:
                lines = [json.loads(line, parse_constant=pytest.fail) for line in answer.text.splitlines()]
                assert not [line for line in lines if "error" in line], (path, content[:300], answer.text)
    return found


def test_odd_requests_get_answers_or_errors_of_the_client(address: str) -> None:
    found = send_odd(address, 200, seed=1)
    assert found[200] > 20
    assert found[400] > 100
