"""An agent's turns with and without a prefix store: seconds to the first token of each.

    python scripts/benchmark_prefixes.py MODEL [--turns 10] [--first 3000] [--new 60] [--max-memory 150MB]

Each turn's prompt is the last one with its answer and `--new` tokens more, as an agent's is. The two sessions take turns, and
every answer must be the same token for token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from rabbit_engine import AutoModel, PrefixStore, Reply, Session

BLOCK_TOKENS = 256


def main(
    model: Annotated[str, typer.Argument(help="A folder or a repo id.")],
    turns: Annotated[int, typer.Option(help="Requests of the agent.")] = 10,
    first: Annotated[int, typer.Option(help="Tokens of the first prompt.")] = 3000,
    new: Annotated[int, typer.Option(help="Tokens that each further turn adds.")] = 60,
    max_memory: Annotated[str | None, typer.Option(help="Memory for weights.")] = None,
) -> None:
    """Print a table."""
    memory: dict[int | str, int | str] | None = {"cpu": max_memory} if max_memory else None
    with (
        tempfile.TemporaryDirectory() as folder,
        PrefixStore(folder, 10**11, block_tokens=BLOCK_TOKENS) as store,
        AutoModel.from_pretrained(model, device="cpu", max_memory=memory) as loaded,
        Session(loaded, max_requests=1) as without,
        Session(loaded, max_requests=1, prefix_store=store) as stored,
    ):
        numbers = torch.randint(5, loaded.config.vocab_size, (first + turns * new,), generator=torch.Generator().manual_seed(1))
        tokens = [int(number) for number in numbers]
        print("| turn | prompt | without s | with s | read | equal |\n|---|---|---|---|---|---|")
        ids = tokens[:first]
        for turn in range(1, turns + 1):
            plain, read = (answer(session, ids) for session in (without, stored))
            store.flush()
            seconds = f"{plain.first_token_s:.2f} | {read.first_token_s:.2f}"
            print(f"| {turn} | {len(ids)} | {seconds} | {read.cached_tokens} | {plain.tokens == read.tokens} |", flush=True)
            ids = [*ids, *read.tokens, *tokens[first + (turn - 1) * new :][:new]]


def answer(session: Session, ids: Sequence[int]) -> Reply:
    """Thirty tokens."""
    return session.generate([list(ids)], max_new_tokens=30, ignore_eos=True)[0]


if __name__ == "__main__":
    typer.run(main)
