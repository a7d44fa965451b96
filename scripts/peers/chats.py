"""`rabbit batch` of chats, then some of them by `generate`, one after another, with the same streamed model.

`python -m peers.chats FOLDER TEXTS --count 200 --alone 20 --tokens 16 --memory BYTES` prints what both took as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from peers.tasks import load_streamed, timed
from peers.timing import peak_rss_bytes
from rabbit_engine import AutoModel, batch


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def answers_of(model: Any, texts: list[str], tokens: int) -> list[str]:
    """The answers of `rabbit batch`, in the order of the texts."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "in.jsonl", Path(scratch) / "out.jsonl"
        lines = [{"messages": user(text), "max_tokens": tokens, "temperature": 0} for text in texts]
        asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
        batch(model, asked, answered)
        found = [json.loads(line) for line in answered.read_text().splitlines()]
    by_line = {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in found}
    return [by_line[f"line-{number}"] for number in range(1, len(texts) + 1)]


def answer_alone(model: Any, text: str, tokens: int) -> str:
    """The answer of `generate`."""
    given = model.tokenizer.apply_chat_template(user(text), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ends = model.tokenizer.eos_token_id
    ids = model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=ends)[0, given["input_ids"].shape[1] :]
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


def main() -> None:
    """Load, answer both ways, compare, print the record."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("texts", type=Path)
    for name in ("--count", "--alone", "--tokens", "--memory"):
        arguments.add_argument(name, type=int, required=True)
    options = arguments.parse_args()
    texts = json.loads(options.texts.read_text())[: options.count]
    with load_streamed(AutoModel, options.folder, options.memory) as model:
        record: dict[str, Any] = {"texts": len(texts), "alone": options.alone, "budget_bytes": model.plan.budget.device_bytes}
        answer_alone(model, texts[0], 1)
        together, record["batch"] = timed(lambda some: answers_of(model, list(some), options.tokens), texts)
        apart, record["generate"] = timed(
            lambda some: [answer_alone(model, text, options.tokens) for text in some], texts[: options.alone]
        )
    record["equal"] = sum(one == other for one, other in zip(together, apart, strict=False))
    print(json.dumps({**record, "peak_rss_bytes": peak_rss_bytes()}), flush=True)


if __name__ == "__main__":
    main()
