"""Tokens a pass and seconds a token by kind of text, for each draft and tree size, on a streamed model.

    python scripts/benchmark_speculation.py MODEL [--draft lookup,DIR,lookup+DIR] [--nodes 16,64,auto] [--tokens N]

The questions are those of `speculation_prompts.toml`: three each of chat, code, summaries of a given text, and JSON. Answers are
the model's own, also where it repeats itself; "equal" counts those that have every token of plain decoding. The last lines are
JSON.
"""

from __future__ import annotations

import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmark_sessions import smallest
from rich.console import Console
from rich.table import Table

from rabbit_engine import AutoModel, DraftModel, Lookup, Merged
from rabbit_engine.decoding import Draft
from rabbit_engine.diagnostics.benchmark import BenchmarkRow
from rabbit_engine.utils.platform import environment

PROMPTS = Path(__file__).parent / "speculation_prompts.toml"

DRAFTS: dict[str, Callable[[int | None], Draft]] = {
    "lookup": Lookup,
    "text": lambda nodes: Lookup(nodes, recycling=False),
}
"""By the name on the command line; other names are folders of models."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, int64 [1, tokens]."""

    kind: str
    ids: torch.Tensor


@dataclass(slots=True)
class Count:
    """Of a kind of text."""

    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    equal: int = 0
    texts: int = 0

    @property
    def tokens_a_pass(self) -> float:
        """The first token of an answer comes from the prompt's pass: neither is counted."""
        return self.tokens / self.passes


@dataclass(slots=True)
class Lane:
    """A draft with a size of its trees, and what it gave."""

    draft: str
    nodes: str
    counts: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))

    @property
    def name(self) -> str:
        """In tables and records."""
        return f"{self.draft}, {self.nodes} nodes"

    def new_draft(self) -> Draft | None:
        """None for plain decoding."""
        nodes = None if self.nodes == "auto" else int(self.nodes)
        if self.draft == "plain":
            return None
        parts = [DRAFTS[name](nodes) if name in DRAFTS else DraftModel(name, nodes=nodes) for name in self.draft.split("+")]
        return parts[0] if len(parts) == 1 else Merged(*parts)


def questions(tokenizer: Any, kinds: Sequence[str]) -> Iterator[Question]:
    """Those of these kinds, as chats; all if none is given."""
    for kind, asked in tomllib.loads(PROMPTS.read_text()).items():
        for one in asked:
            text = "\n\n".join([one["question"], *([one["text"].strip()] if "text" in one else [])])
            chat = [{"role": "user", "content": text}]
            if not kinds or kind in kinds:
                ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
                yield Question(kind, ids["input_ids"])


def answer(model: Any, question: Question, tokens: int, draft: Draft | None) -> list[int]:
    """Greedy."""
    found = model.generate(question.ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, speculate=draft)
    said: list[int] = found[0, question.ids.shape[1] :].tolist()
    return said


def run(model: Any, lane: Lane, asked: Sequence[Question], tokens: int, plain: Sequence[list[int]]) -> list[list[int]]:
    """Answer all questions with one draft, which may learn from each for the next."""
    draft, answers = lane.new_draft(), []
    for index, question in enumerate(asked):
        passes, began = model.profile.passes, time.perf_counter()
        answers.append(answer(model, question, tokens, draft))
        seconds = time.perf_counter() - began
        for kind in (question.kind, "all"):
            count = lane.counts[kind]
            count.seconds += seconds
            count.passes += model.profile.passes - passes - 1
            count.tokens += len(answers[-1]) - 1
            count.texts += 1
            count.equal += not plain or answers[-1] == plain[index]
    return answers


def measure(model: Any, lanes: Sequence[Lane], asked: Sequence[Question], tokens: int) -> Lane:
    """Run all lanes; returns plain decoding, to compare with."""
    plain = Lane("plain", "0")
    said = run(model, plain, asked, tokens, [])
    for lane in lanes:
        run(model, lane, asked, tokens, said)
    return plain


def as_table(lanes: Sequence[Lane]) -> Table:
    """Tokens a pass by kind, and seconds a token and equal answers of all."""
    kinds = sorted(lanes[0].counts, key=lambda kind: kind == "all")
    table = Table("draft", "nodes", *kinds, "seconds a token", "equal")
    for lane in lanes:
        whole = lane.counts["all"]
        rates = [f"{lane.counts[kind].tokens_a_pass:.2f}" for kind in kinds]
        table.add_row(
            Path(lane.draft).name, lane.nodes, *rates, f"{whole.seconds / whole.tokens:.3f}", f"{whole.equal} of {whole.texts}"
        )
    return table


def as_record(lane: Lane, conditions: dict[str, Any]) -> BenchmarkRow:
    """The project's record type; a round is all answers."""
    whole = lane.counts["all"]
    rates = {kind: round(count.tokens_a_pass, 3) for kind, count in lane.counts.items()}
    told = {"tokens_a_pass": rates, "tokens": whole.tokens, "passes": whole.passes, "equal": whole.equal, "texts": whole.texts}
    return BenchmarkRow(lane.name, (whole.seconds,), 0, {**conditions, **told})


def main(
    model: Annotated[Path, typer.Argument(help="A folder with a chat model and its tokenizer.")],
    draft: Annotated[
        str, typer.Option(help="lookup, text (lookup without recycling), a model's folder, or some of them: a+b.")
    ] = "lookup",
    nodes: Annotated[str, typer.Option(help="Sizes of trees; auto: measured.")] = "16,64",
    kinds: Annotated[str, typer.Option(help="Of questions: chat,code,summary,json; all by default.")] = "",
    tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 128,
    dtype: str = "float32",
    memory: Annotated[str | None, typer.Option(help="max_memory on the CPU; the smallest by default.")] = None,
) -> None:
    """Answer all questions plainly and with every draft, print a table and the records."""
    lanes = [Lane(name, size) for name in draft.split(",") for size in nodes.split(",")]
    limit = {"cpu": memory} if memory else smallest(model, dtype=dtype)
    with AutoModel.from_pretrained(model, dtype=dtype, max_memory=limit) as streamed:
        asked = list(questions(streamed.tokenizer, kinds.split(",") if kinds else ()))
        lanes = [measure(streamed, lanes, asked, tokens), *lanes]
    Console(width=140).print(as_table(lanes))
    conditions = {"model": model.name, "dtype": dtype, **environment(), "threads": torch.get_num_threads()}
    for lane in lanes:
        print(as_record(lane, conditions).as_json())


if __name__ == "__main__":
    typer.run(main)
