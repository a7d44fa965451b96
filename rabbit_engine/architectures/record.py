"""The recorded test results of each family, written by `make matrix`; do not edit the file by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import PretrainedConfig

from rabbit_engine.transformers_bridge.remote_code import is_remote

COLUMNS = ("split", "logits", "cache", "batch", "beam", "assisted", "experts", "speculation", "tokenizer")
_FILE = Path(__file__).with_name("proven.json")


@dataclass(frozen=True, slots=True)
class Proof:
    """One row: the models, the class that their checkpoints name, the class that ran, the reference, and the columns."""

    models: str
    cls: str
    runs_as: str
    oracle: str
    columns: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Record:
    """All rows of one run, its date (ISO), and the versions of Python, torch and transformers it ran on."""

    date: str
    versions: Mapping[str, str]
    rows: tuple[Proof, ...]


@cache
def read_record() -> Record:
    """The record shipped with this version."""
    raw = json.loads(_FILE.read_text(encoding="utf-8"))
    rows = tuple(
        Proof(row["models"], row["class"], row["runs_as"], row["oracle"], {name: row[name] for name in COLUMNS})
        for row in raw["rows"]
    )
    return Record(raw["date"], raw["versions"], rows)


def recorded_speculation(cls: type, config: PretrainedConfig) -> str:
    """The column "speculation" of the models that run as `cls`; empty if the record does not tell.

    It does not for a repository's own class, whatever its name, nor where its rows differ, nor for a config with ALiBi's biases:
    the same class computes them from another mask.
    """
    if is_remote(cls) or getattr(config, "alibi", False):
        return ""
    found = {row.columns["speculation"] for row in read_record().rows if row.runs_as == cls.__name__}
    return found.pop() if len(found) == 1 else ""
