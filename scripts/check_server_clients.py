"""Runs clients of others against a server of a small model: exit code 1 if one of them does not get what it should.

python scripts/check_server_clients.py CHECK [MODEL]     needs the packages lm-eval[api], instructor or langchain-openai

CHECK is lm-eval (the harness' local-completions gives the log-likelihoods of its own HFLM), instructor, langchain; claude, cn,
aider or llm, programs on PATH; vscode, requests alone; or all. What is not installed is skipped.
Without MODEL it is SmolLM2-135M-Instruct, from the wheel that `make` installs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import uvicorn
from pydantic import BaseModel, ConfigDict, Field
from server_programs import NAME, Check, Programs

from rabbit_engine import AutoModel, Session
from rabbit_engine.diagnostics.demo import wheel_file
from rabbit_engine.server.app import create_app

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " the city of London"),
    ("Two plus two is", " four"),
    ("A rabbit eats", " fresh green grass, and carrots."),
]


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    size: Literal["small", "large"]


@contextmanager
def serving(session: Session) -> Iterator[str]:
    """The address of a server of the session."""
    server = uvicorn.Server(uvicorn.Config(create_app(session, NAME), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


def check_lm_eval(session: Session, url: str) -> bool:
    """Log-likelihoods of continuations through `local-completions`, and of HFLM with the same model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    model: Any = session.model
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save_pretrained(folder)
        own = LocalCompletionsAPI(base_url=f"{url}/completions", model=NAME, tokenizer=folder, tokenizer_backend="huggingface")
        found = own.loglikelihood(asked)
    expected = HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=1).loglikelihood(asked)
    furthest = max(abs(one[0] - other[0]) for one, other in zip(found, expected, strict=True))
    print(f"lm-eval: {[(round(value, 4), greedy) for value, greedy in found]}, at most {furthest:.1e} from HFLM's")
    return furthest < 1e-3 and [bool(one[1]) for one in found] == [bool(other[1]) for other in expected]


def check_instructor(_: Session, url: str) -> bool:
    """Objects through forced calls, JSON schemas and their streams."""
    import instructor
    import openai

    plain = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "Describe Paris."}], "max_tokens": 80}
    found = []
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client: Any = instructor.from_openai(plain, mode=mode)
        found.append(client.chat.completions.create(response_model=City, max_retries=0, **asked))
        found.append([*client.chat.completions.create_partial(response_model=City, max_retries=0, **asked)][-1])
    print(f"instructor: {found}")
    return all(each.name is not None and each.size in ("small", "large") for each in found)


def check_langchain(_: Session, url: str) -> bool:
    """`with_structured_output` in all its methods, and a stream."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key="none", model=NAME, max_tokens=80, max_retries=0, timeout=600)  # type: ignore[arg-type, call-arg, unused-ignore]
    found: list[Any] = []
    for method in ("json_schema", "function_calling"):
        structured: Any = chat.with_structured_output(City, method=method)
        found.append(structured.invoke("Describe Paris."))
    streamed = "".join(str(chunk.content) for chunk in chat.stream("Count to three."))
    responses = ChatOpenAI(  # type: ignore[call-arg, unused-ignore]
        base_url=url,
        api_key="none",
        model=NAME,
        max_tokens=80,
        max_retries=0,
        timeout=600,
        use_responses_api=True,  # type: ignore[arg-type, unused-ignore]
    )
    found.append(responses.with_structured_output(City, method="json_schema").invoke("Describe Paris."))
    print(f"langchain: {found}, streamed {streamed[:40]!r}")
    return all(isinstance(each, City) for each in found) and bool(streamed)


CHECKS: dict[str, Check] = {
    "lm-eval": check_lm_eval,
    "instructor": check_instructor,
    "langchain": check_langchain,
    **Programs(serving).checks,
}


def passes(name: str, session: Session, url: str) -> bool:
    """Run a check; one whose package or program is missing passes, and says so."""
    try:
        found = CHECKS[name](session, url)
    except ImportError as error:
        print(f"{name}: skipped, {error}")
        return True
    if found is None:
        print(f"{name}: skipped, the program is not on PATH")
    return found is not False


def main() -> None:
    """Serve the model and run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=[*CHECKS, "all"])
    parser.add_argument("model", nargs="?", default=None)
    given = parser.parse_args()
    model = given.model or wheel_file()
    with (
        tempfile.TemporaryDirectory() as shards,
        AutoModel.from_pretrained(str(model), device="cpu", layer_shards_saving_path=Path(shards)) as loaded,
        Session(loaded) as session,
        serving(session) as url,
    ):
        chosen = CHECKS if given.check == "all" else [given.check]
        failed = [name for name in chosen if not passes(name, session, url)]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
