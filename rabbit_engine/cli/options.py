"""Arguments and options that several commands have, as types of their parameters. Values are judged here, before torch loads."""

from __future__ import annotations

import math
import os.path
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rabbit_engine.utils.names import read_name
from rabbit_engine.utils.sizes import parse_bytes, parse_rate

COLDEST = 1e-3
"""Logits that are divided by less overflow: a lower temperature is greedy."""

_PLACE = re.compile(r"(cuda:)?\d+|cpu|mps(:0)?")


def parse_memory(text: str | None) -> dict[int | str, int | str] | None:
    """`"8GiB"` is the device's budget; `"0=8GiB,cpu=24GiB"` names each place. Raises ValueError."""
    if text is None:
        return None
    if "=" not in text:
        parse_bytes(text)
        return {0: text, "cpu": text}
    places: dict[int | str, int | str] = {}
    for part in text.split(","):
        place, is_named, size = (word.strip() for word in part.partition("="))
        if not is_named or not _PLACE.fullmatch(place):
            raise ValueError(f"{part!r} names no place: write 8GiB, or 0=8GiB,cpu=24GiB")
        parse_bytes(size)
        places[int(place) if place.isdigit() else place] = size
    return places


def _check_memory(text: str | None) -> str | None:
    try:
        parse_memory(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text


def _check_finite(value: float | None) -> float | None:
    """Comparisons alone let `nan` pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number to calculate with")
    return value


def check_rate(text: str | None) -> str | None:
    """Bytes a second, above zero."""
    try:
        if text is not None and parse_rate(text) <= 0:
            raise typer.BadParameter(f"{text}: nothing would ever arrive")
    except ValueError as error:
        raise typer.BadParameter(f'{text} is no rate: write "5GB" for 5 GB a second') from error
    return text


def _parse_folder(text: str) -> Path:
    """An empty text, of which Path makes the current folder, is more likely a variable that is not set."""
    if not text:
        raise typer.BadParameter("it is empty: name a folder")
    if os.path.isfile(text):  # noqa: PTH113 - Path's own raises for a name that is too long
        raise typer.BadParameter(f"{text} is a file: name a folder")
    return Path(text)


def folder(said: str) -> Any:
    """An option that takes a folder, there already or not."""
    return typer.Option(parser=_parse_folder, metavar="<dir>", help=said)


def _check_model(name: str) -> str:
    read_name(name)
    return name


Model = Annotated[str, typer.Argument(callback=_check_model, help="A repo id, a folder, or a .gguf file.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, max=100.0, callback=_check_finite, help="Sample, at this temperature; 0 is greedy.")
]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, callback=_check_finite, help="Sample from the likeliest tokens of this total probability."),
]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from this many likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(min=-(2**63), max=2**64 - 1, help="Sample, from this seed.")]
Device = Annotated[str | None, typer.Option(help="cuda:0, mps or cpu; the default is the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="The default is the checkpoint's own.")]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", "-m", callback=_check_memory, help="What weights may take: 8GiB, or 0=8GiB,cpu=24GiB."),
]
Attention = Annotated[
    Literal["auto", "flash_attention_2", "sdpa", "eager"], typer.Option(help="How attention is computed.", case_sensitive=False)
]
Split = Annotated[
    Literal["auto", "always", "never"],
    typer.Option(help="Make shards first; auto does where the files cannot be streamed as they are.", case_sensitive=False),
]
SavingPath = Annotated[Path | None, folder("Where the shards go; the default is beside the checkpoint.")]
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
    """What `max_seq_len` is for commands that hold conversations; a budget that was given holds no tokens unless it is said."""
    return max_seq_len or (None if max_memory is not None else DEFAULT_TOKENS)
