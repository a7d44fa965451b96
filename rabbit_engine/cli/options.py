"""Arguments and options of several commands, except those for loading. Values are checked before torch is imported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from rabbit_engine.utils.names import read_name
from rabbit_engine.utils.sizes import parse_rate

COLDEST = 1e-3
"""Dividing logits by less overflows: lower temperatures are greedy."""


def _check_finite(value: float | None) -> float | None:
    """Reject `nan`, which `min` and `max` accept."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def check_rate(text: str | None) -> str | None:
    """A rate in bytes per second, above zero."""
    try:
        if text is not None and parse_rate(text) <= 0:
            raise typer.BadParameter(f"{text}: the rate must be above zero")
    except ValueError as error:
        raise typer.BadParameter(f'{text} is not a rate: write "5GB" for 5 GB per second') from error
    return text


def _check_model(name: str) -> str:
    read_name(name)
    return name


def _read_schema(given: str | None) -> str | None:
    """The JSON text of a schema, or of a file with one."""
    if given is None or given.lstrip().startswith("{"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{given} is neither a JSON object nor a file that can be read: {error}") from error


Model = Annotated[str, typer.Argument(callback=_check_model, help="A repo id, a folder, or a .gguf file.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, max=100.0, callback=_check_finite, help="Sample at this temperature; 0 is greedy.")
]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, callback=_check_finite, help="Sample from the likeliest tokens with this total probability."),
]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from this many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(min=-(2**63), max=2**64 - 1, help="Sample with this seed.")]
Schema = Annotated[
    str | None,
    typer.Option(callback=_read_schema, metavar="FILE|JSON", help="Answer with JSON of this JSON schema, in a file or as text."),
]
Regex = Annotated[str | None, typer.Option(help="Answer with text that this regular expression matches.")]
Choice = Annotated[list[str] | None, typer.Option(help="Answer with this text, or that of another --choice.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="For answers whose request sets no limit.")]
Overflow = Annotated[
    Literal["refuse", "truncate"], typer.Option(help="What to do with prompts that are too long.", case_sensitive=False)
]
ShareProducts = Annotated[
    bool, typer.Option(help="Batch the texts of a pass: faster on a CPU, but no longer bit for bit the same.")
]
