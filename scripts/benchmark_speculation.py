"""Tokens a pass and seconds a token by kind of text, for each draft and tree size, on a streamed model.

    python scripts/benchmark_speculation.py MODEL [--draft lookup,DIR,lookup+DIR] [--nodes 16,64,auto] [--tokens N] [--rounds N]

The questions are those of `speculation_prompts.toml`: three each of chat, code, summaries of a given text, and JSON. Answers are
the model's own, also where it repeats itself; "equal" counts those that have every token of plain decoding. Each question is
answered by all drafts before the next one is asked, and a round asks all of them, of new drafts that have learnt nothing.
Seconds are those after the first token, which comes from the prompt's pass. The last lines are JSON.
"""

from __future__ import annotations

import statistics
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
from transformers.generation.streamers import BaseStreamer

from rabbit_engine import AutoModel, DraftModel, Lookup, Merged, Session
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


@dataclass(frozen=True, slots=True)
class Text:
    """An answer, and what came after its first token: passes, nodes of trees, and seconds."""

    tokens: list[int]
    passes: int
    nodes: int
    seconds: float


@dataclass(slots=True)
class Count:
    """Of a kind of text."""

    tokens: int = 0
    passes: int = 0
    nodes: int = 0
    seconds: list[float] = field(default_factory=list)
    """A token, in each round."""
    equal: int = 0
    texts: int = 0

    def add(self, text: Text, *, equal: bool) -> None:
        """Count an answer, but for its seconds."""
        self.passes += text.passes
        self.nodes += text.nodes
        self.tokens += len(text.tokens) - 1
        self.texts += 1
        self.equal += equal

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


def questions(tokenizer: Any, kinds: Sequence[str], each: int | None = None) -> Iterator[Question]:
    """Up to `each` of these kinds, as chats; of all kinds if none is given."""
    for kind, asked in tomllib.loads(PROMPTS.read_text()).items():
        for one in asked[:each]:
            text = "\n\n".join([one["question"], *([one["text"].strip()] if "text" in one else [])])
            chat = [{"role": "user", "content": text}]
            if not kinds or kind in kinds:
                ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
                yield Question(kind, ids["input_ids"])


class Stopwatch(BaseStreamer):
    """Notes when the first token of an answer came."""

    def __init__(self) -> None:
        self.began: float | None = None
        self._has_prompt = False

    def put(self, value: Any) -> None:
        """The prompt, then each token."""
        del value
        if self._has_prompt and self.began is None:
            self.began = time.perf_counter()
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is noted."""


def answer(model: Any, question: Question, tokens: int, draft: Draft | None) -> Text:
    """Greedy."""
    watch, before = Stopwatch(), model.profile
    found = model.generate(question.ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, speculate=draft, streamer=watch)
    seconds = time.perf_counter() - (watch.began or 0.0)
    after = model.profile
    nodes = after.speculation.nodes - before.speculation.nodes
    return Text(found[0, question.ids.shape[1] :].tolist(), after.passes - before.passes - 1, nodes, seconds)


def answer_together(model: Any, asked: Sequence[Question], tokens: int, draft: Draft | None) -> list[Text]:
    """Greedy, in one session. What the answers share counts for the first."""
    before = model.profile
    with Session(model, speculate=draft, max_requests=len(asked)) as session:
        replies = session.generate([question.ids[0].tolist() for question in asked], max_new_tokens=tokens, temperature=0)
    after = model.profile
    seconds = max(reply.seconds for reply in replies) - max(reply.first_token_s for reply in replies)
    shared = after.passes - before.passes - 1, after.speculation.nodes - before.speculation.nodes, seconds
    return [Text(list(reply.tokens), *(shared if not index else (0, 0, 0.0))) for index, reply in enumerate(replies)]


def run_round_together(model: Any, lanes: Sequence[Lane], asked: Sequence[Question], tokens: int) -> None:
    """Answer all questions at once with every lane, the first of which is plain decoding."""
    plain: list[Text] | None = None
    for lane in lanes:
        texts = answer_together(model, asked, tokens, lane.new_draft())
        plain = plain or texts
        count = lane.counts["all"]
        for text, other in zip(texts, plain, strict=True):
            count.add(text, equal=text.tokens == other.tokens)
        count.seconds.append(texts[0].seconds / sum(len(text.tokens) - 1 for text in texts))


def run_round(model: Any, lanes: Sequence[Lane], asked: Sequence[Question], tokens: int) -> None:
    """Answer each question with every lane, the first of which is plain decoding."""
    drafts = [lane.new_draft() for lane in lanes]
    texts: dict[tuple[int, str], list[Text]] = defaultdict(list)
    for question in asked:
        plain: list[int] | None = None
        for index, (lane, draft) in enumerate(zip(lanes, drafts, strict=True)):
            text = answer(model, question, tokens, draft)
            plain = plain or text.tokens
            for kind in (question.kind, "all"):
                lane.counts[kind].add(text, equal=text.tokens == plain)
                texts[index, kind].append(text)
    for (index, kind), found in texts.items():
        said = sum(len(text.tokens) - 1 for text in found)
        lanes[index].counts[kind].seconds.append(sum(text.seconds for text in found) / said)


def measure(
    model: Any, lanes: Sequence[Lane], asked: Sequence[Question], tokens: int, rounds: int = 1, together: bool = False
) -> Lane:
    """Run all lanes; returns plain decoding, to compare with."""
    plain = Lane("plain", "0")
    for _ in range(rounds):
        (run_round_together if together else run_round)(model, [plain, *lanes], asked, tokens)
    return plain


def ratio(lane: Lane, plain: Lane, kind: str) -> float:
    """Seconds a token over those of plain decoding, the median of the rounds."""
    pairs = zip(lane.counts[kind].seconds, plain.counts[kind].seconds, strict=True)
    return statistics.median(own / other for own, other in pairs)


def as_table(lanes: Sequence[Lane]) -> Table:
    """Tokens a pass and seconds a token over those of the first lane by kind, and seconds a token and equal answers of all."""
    kinds = sorted(lanes[0].counts, key=lambda kind: kind == "all")
    table = Table(
        "draft", "nodes", *kinds, "seconds a token", "nodes a pass", "equal", title="tokens a pass (share of plain seconds)"
    )
    for lane in lanes:
        whole = lane.counts["all"]
        rates = [f"{lane.counts[kind].tokens_a_pass:.2f} ({ratio(lane, lanes[0], kind):.2f})" for kind in kinds]
        seconds = f"{statistics.median(whole.seconds):.3f}"
        sizes = f"{whole.nodes / whole.passes:.1f}"
        table.add_row(Path(lane.draft).name, lane.nodes, *rates, seconds, sizes, f"{whole.equal} of {whole.texts}")
    return table


def as_record(lane: Lane, conditions: dict[str, Any]) -> BenchmarkRow:
    """The project's record type; a round's seconds are those of a token."""
    whole = lane.counts["all"]
    rates = {kind: round(count.tokens_a_pass, 3) for kind, count in lane.counts.items()}
    seconds = {kind: count.seconds for kind, count in lane.counts.items()}
    told = {"tokens_a_pass": rates, "seconds": seconds, "tokens": whole.tokens, "passes": whole.passes, "nodes": whole.nodes}
    return BenchmarkRow(lane.name, tuple(whole.seconds), 0, {**conditions, **told, "equal": whole.equal, "texts": whole.texts})


def main(
    model: Annotated[Path, typer.Argument(help="A folder with a chat model and its tokenizer.")],
    draft: Annotated[
        str, typer.Option(help="lookup, text (lookup without recycling), a model's folder, or some of them: a+b.")
    ] = "lookup",
    nodes: Annotated[str, typer.Option(help="Sizes of trees; auto: measured.")] = "16,64",
    kinds: Annotated[str, typer.Option(help="Of questions: chat,code,summary,json; all by default.")] = "",
    questions_each: Annotated[int, typer.Option("--questions", help="Of each kind, at most.")] = 3,
    tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 128,
    rounds: int = 1,
    together: Annotated[bool, typer.Option("--together", help="All questions at once, in a session.")] = False,
    dtype: str = "float32",
    memory: Annotated[str | None, typer.Option(help="max_memory on the CPU; the smallest by default.")] = None,
) -> None:
    """Answer all questions plainly and with every draft, print a table and the records."""
    lanes = [Lane(name, size) for name in draft.split(",") for size in nodes.split(",")]
    limit = {"cpu": memory} if memory else smallest(model, dtype=dtype)
    with AutoModel.from_pretrained(model, dtype=dtype, max_memory=limit) as streamed:
        asked = list(questions(streamed.tokenizer, kinds.split(",") if kinds else (), questions_each))
        lanes = [measure(streamed, lanes, asked, tokens, rounds, together), *lanes]
    Console(width=160).print(as_table(lanes))
    conditions = {"model": model.name, "dtype": dtype, **environment(), "threads": torch.get_num_threads()}
    for lane in lanes:
        print(as_record(lane, conditions).as_json())


if __name__ == "__main__":
    typer.run(main)
