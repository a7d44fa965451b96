"""The description at /openapi.json, and odd requests to the pages that it describes; scripts/check_openapi.py does more."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import talking
from serving import NAME, SECRET, get, serving

from rabbit_engine import AutoModel, Session

KEY = {"x-api-key": SECRET.secret}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = talking.save(tmp_path_factory.mktemp("talking"))
    with (
        AutoModel.from_pretrained(folder, device="cpu") as model,
        Session(model, max_new_tokens=2) as session,
        serving(session, keys=[SECRET]) as url,
    ):
        yield url


def references(value: Any) -> Iterator[str]:
    """All `$ref` in a document."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)


def test_every_route_is_described_with_its_body_and_errors(url: str) -> None:
    assert get(f"{url}/openapi.json").status_code == 401
    found = get(f"{url}/openapi.json", headers=KEY).json()
    assert {"/", "/health", "/metrics", "/v1/models/{model}", "/v1/chat/completions"} <= set(found["paths"])
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            assert {"200", "4XX", "503"} <= set(operation["responses"]), path
            assert operation["responses"]["4XX"]["content"]["application/json"]["schema"]["properties"], path
            assert "422" not in operation["responses"]
            assert (
                method != "post" or "{" in path or operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
            )
    names = {f"#/components/schemas/{name}" for name in found["components"]["schemas"]}
    used = set(references(found))
    assert used
    assert used <= names
    chat = found["paths"]["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["messages"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert found["paths"]["/health"]["get"]["security"] == []
    assert found["security"] == [{"bearer": []}, {"key": []}]


def test_a_wrong_method_is_told_the_right_ones(url: str) -> None:
    answer = httpx.request("DELETE", f"{url}/health")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET")


VALUES = (
    "",
    "nan",
    "inf",
    "-1",
    "1e999",
    "0",
    "abc",
    "null",
    "[]",
    "%00",
    "%ff",
    "\u00e9",
    "x" * 3000,
    NAME,
    "../../etc/passwd",
    "1" * 400,
)
PATHS = (
    "/",
    "/health",
    "/metrics",
    "/plan",
    "/lanes",
    "/openapi.json",
    "/v1/models",
    "/v1/models/x",
    "/v1",
    "/nothing",
    "//",
    "/%2e%2e/",
)
NAMES = ("seconds", "model", "seconds%5B%5D", "", "__proto__")
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW")
HEADERS = (
    "Accept",
    "Content-Type",
    "Content-Length",
    "Range",
    "Origin",
    "Expect",
    "If-None-Match",
    "Cookie",
    "X-Api-Key",
    "Upgrade",
)


def test_odd_requests_to_the_servers_own_pages_get_no_server_error(url: str) -> None:
    """RABBIT_ODD_REQUESTS sets how many."""
    chance = random.Random(4)
    with httpx.Client(timeout=30) as client:
        for _ in range(int(os.environ.get("RABBIT_ODD_REQUESTS", "300"))):
            query = "&".join(f"{chance.choice(NAMES)}={chance.choice(VALUES)}" for _ in range(chance.randrange(4)))
            path = chance.choice(PATHS) + (chance.choice(VALUES) if chance.random() < 0.2 else "")
            odd = {chance.choice(HEADERS): chance.choice(VALUES).encode() for _ in range(chance.randrange(3))}
            odd.pop("Content-Length", None)  # the client itself would wait for the body
            method = chance.choice(METHODS) if chance.random() < 0.5 else "GET"
            answer = client.request(method, f"{url}{path}?{query}", headers={**KEY, **odd} if chance.random() < 0.8 else odd)
            assert answer.status_code < 500, (method, path, query, odd, answer.text)
            if answer.status_code >= 400 and method != "HEAD" and answer.content:
                json.loads(answer.content)
