"""An agent's turns without a prefix store, with one, and with one in a session that continues its last text: seconds to the
first token of each turn, and seconds of processor time in all threads until then.

    python scripts/benchmark_prefixes.py MODEL [--turns 10] [--first 3000] [--new 60] [--answer 30] [--rounds 1]
                                         [--max-memory 150MB]

Each turn's prompt is the last one with its answer and `--new` tokens more, as an agent's is. The sessions take turns; in each
round the stores are empty at first. Answers of the first two must be the same token for token; those of the third may differ by
rounding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import torch
import typer

from rabbit_engine import AutoModel, PrefixStore, Reply, Session

BLOCK_TOKENS = 256
KINDS = ("none", "store", "continued")


def main(
    model: Annotated[str, typer.Argument(help="A folder or a repo id.")],
    turns: Annotated[int, typer.Option(help="Requests of the agent.")] = 10,
    first: Annotated[int, typer.Option(help="Tokens of the first prompt.")] = 3000,
    new: Annotated[int, typer.Option(help="Tokens that each further turn adds.")] = 60,
    max_memory: Annotated[str | None, typer.Option(help="Memory for weights.")] = None,
    answer: Annotated[int, typer.Option(help="Tokens of each answer.")] = 30,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the table has medians.")] = 1,
) -> None:
    """Print a table."""
    memory: dict[int | str, int | str] | None = {"cpu": max_memory} if max_memory else None
    with AutoModel.from_pretrained(model, device="cpu", max_memory=memory) as loaded:
        numbers = torch.randint(5, loaded.config.vocab_size, (first + turns * new,), generator=torch.Generator().manual_seed(1))
        tokens = [int(number) for number in numbers]
        found = [one_round(loaded, tokens, turns, first, new, answer) for _ in range(rounds)]
    print("| turn | prompt | none s | store s | continued s | none CPU | store CPU | continued CPU | read | equal |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for turn in range(turns):
        of_turn = [each[turn] for each in found]
        times = [median(row[kind].first_s for row in of_turn) for kind in KINDS]
        cpu = [median(row[kind].cpu_s for row in of_turn) for kind in KINDS]
        replies = {kind: of_turn[0][kind].reply for kind in KINDS}
        equal = [all(row[kind].reply.tokens == row["none"].reply.tokens for row in of_turn) for kind in KINDS[1:]]
        read = ", ".join(str(replies[kind].cached_tokens) for kind in KINDS[1:])
        shown = " | ".join(f"{value:.2f}" for value in (*times, *cpu))
        print(f"| {turn + 1} | {replies['none'].prompt_tokens} | {shown} | {read} | {', '.join(map(str, equal))} |")


@dataclass(frozen=True, slots=True)
class Timed:
    """A reply, the seconds to its first token, and those of the processor."""

    reply: Reply
    first_s: float
    cpu_s: float


def one_round(loaded: Any, tokens: Sequence[int], turns: int, first: int, new: int, answer: int) -> list[dict[str, Timed]]:
    """The turns of each kind of session, with new stores at first."""
    found: list[dict[str, Timed]] = []
    with opened(loaded) as (sessions, stores):
        ids = list(tokens[:first])
        for turn in range(1, turns + 1):
            found.append({kind: timed(session, ids, answer) for kind, session in sessions.items()})
            for store in stores:
                store.flush()
            ids = [*ids, *found[-1]["none"].reply.tokens, *tokens[first + (turn - 1) * new :][:new]]
    return found


@contextmanager
def opened(loaded: Any) -> Iterator[tuple[dict[str, Session], list[PrefixStore]]]:
    """A session of each kind, and two empty stores."""
    with ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2)]
        stores = [stack.enter_context(PrefixStore(folder, 10**11, block_tokens=BLOCK_TOKENS)) for folder in folders]
        options: tuple[dict[str, Any], ...] = (
            {},
            {"prefix_store": stores[0]},
            {"prefix_store": stores[1], "continue_last": True},
        )
        sessions = [stack.enter_context(Session(loaded, max_requests=1, **each)) for each in options]
        yield dict(zip(KINDS, sessions, strict=True)), stores


def timed(session: Session, ids: Sequence[int], answer: int) -> Timed:
    """An answer, its seconds to the first token, and those of the processor."""
    began, first = time.process_time(), 0.0
    events: list[object] = []

    def tell(_: int, event: object) -> None:
        nonlocal first
        first = first or time.process_time() - began
        events.append(event)

    session.ask([session.request_text(list(ids), max_new_tokens=answer, ignore_eos=True)], tell)
    while not (events and not_a_piece(events[-1])):
        time.sleep(0.005)
    reply = events[-1]
    assert isinstance(reply, Reply), reply
    return Timed(reply, reply.first_token_s, first)


def not_a_piece(event: object) -> bool:
    """Whether the answer has ended."""
    return isinstance(event, Reply | BaseException)


if __name__ == "__main__":
    typer.run(main)
