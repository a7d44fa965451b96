"""Arguments and options that several commands have, as types of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A repo id, a folder, or a .gguf file.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this total probability.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from this many likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="Sample, from this seed.")]
Device = Annotated[str | None, typer.Option(help="cuda:0, mps or cpu; the default is the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="The default is the checkpoint's own.")]
MaxMemory = Annotated[str | None, typer.Option(help="What weights may take: 8GiB, or 0=8GiB,cpu=24GiB.")]
Attention = Annotated[str, typer.Option(help="auto, flash_attention_2, sdpa or eager.")]
SavingPath = Annotated[Path | None, typer.Option(help="Where the shards go; the default is beside the checkpoint.")]
GgufFile = Annotated[str | None, typer.Option(help="Which GGUF file of the folder or repo.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]
Token = Annotated[str | None, typer.Option(help="For gated repos; HF_TOKEN is read too.", show_default=False)]
MaxSeqLen = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of all texts under way, to set memory aside for: 4096, but none with --max-memory."),
]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run code that the repository brings.")]

DEFAULT_TOKENS = 4096
"""Memory is set aside for so many where nobody bounds it."""


def tokens_set_aside(max_seq_len: int | None, max_memory: str | None) -> int | None:
    """What `max_seq_len` is for commands that hold conversations; a budget that was given is for the weights alone."""
    return max_seq_len or (None if max_memory is not None else DEFAULT_TOKENS)
