"""Runs schemathesis against the server of a tiny model, by its /openapi.json: no server error, and only documented answers.

    python scripts/check_openapi.py [--examples 200]

schemathesis must be installed (`pip install schemathesis`); it is in no extra of this package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "ignored_auth",
)
"""Not among them: those of accepted and rejected data, because the server decides on many values by rules that JSON Schema
cannot say, such as the vocabulary and the chat template."""


def main() -> int:
    """Start the server, run schemathesis, and return its exit status."""
    import httpx
    import talking  # type: ignore[import-not-found] # from the tests
    from serving import NAME, SECRET, serving  # type: ignore[import-not-found]

    from rabbit_engine import AutoModel, Session

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="examples for each route")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        AutoModel.from_pretrained(talking.save(Path(folder)), device="cpu") as model,
        Session(model, max_new_tokens=4) as session,
        serving(session, keys=[SECRET]) as url,
    ):
        key = f"Authorization: Bearer {SECRET.secret}"
        document = httpx.get(f"{url}/openapi.json", headers={"x-api-key": SECRET.secret}).json()
        path = Path(folder) / "openapi.json"
        path.write_text(json.dumps(narrowed(document, NAME)))
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", str(path)]
        options = ["--url", url, "--header", key, "--checks", ",".join(CHECKS), "--request-timeout", "60"]
        numbers = ["--max-examples", str(given.examples), "--seed", str(given.seed)]
        return subprocess.run([*command, *options, *numbers], check=False, cwd=folder).returncode  # it writes what it found


def narrowed(document: dict[str, Any], model: str) -> dict[str, Any]:
    """The document with the only model's name, so that most requests reach it, and one of the two ways to send a key."""
    for methods in document["paths"].values():
        for operation in methods.values():
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"] = {"const": model}
    return {**document, "security": [{"bearer": []}]}


if __name__ == "__main__":
    raise SystemExit(main())
