"""Reads and checks config.json before transformers or any model class sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from rabbit_engine.architectures.architecture import RawConfig
from rabbit_engine.config import COMPUTED_DTYPES
from rabbit_engine.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DamagedCheckpointError,
    UnsupportedArchitectureError,
    first_line,
)

_COUNT = re.compile(r"(^|_)(layers?|depth|blocks|experts|labels)$")
_MOST, _MOST_EXPERTS, _MOST_LABELS = 10_000, 100_000, 1_000_000
"""Limits for layers, for experts (Doge names 16,384) and for labels: more than any model has, and still fast to enumerate."""

_UNUSED = "model_max_length"
"""A tokenizer setting that some configs include; 10**30 stands for no limit there."""


def read_config(folder: Path) -> RawConfig:
    """The contents of config.json.

    Raises CheckpointNotFoundError if it is missing, DamagedCheckpointError if it is not a JSON object, and
    UnsupportedArchitectureError for an implausible number of layers, experts or labels, or an integer beyond 64 bits.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointNotFoundError(f"{folder} has no config.json: is it a model folder?")
    raw = read_object(path, "download it again")
    for key, value in _numbers(raw):
        most = _MOST_LABELS if key.endswith("labels") else _MOST_EXPERTS if key.endswith("experts") else _MOST
        if value > most and _COUNT.search(key):
            raise UnsupportedArchitectureError(f"{path} has {key}={value}, more than any model has: download it again")
        if isinstance(value, int) and not -(2**63) <= value < 2**63 and not key.endswith(_UNUSED):
            raise UnsupportedArchitectureError(f"{path} has {key}={value}, which does not fit in 64 bits: download it again")
    return raw


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file. Raises DamagedCheckpointError, with `advice`, if it cannot be read or holds something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({first_line(error)}): {advice}") from error
    if not isinstance(raw, dict):
        raise DamagedCheckpointError(f"{path} holds a JSON {type(raw).__name__}, expected an object: {advice}")
    return raw


def _numbers(raw: RawConfig) -> Iterator[tuple[str, float]]:
    """Every number in the config with its key, at any depth."""
    left: list[tuple[str, Any]] = list(raw.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value


def stated_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The weights' dtype according to the config, or None if it names none.

    Raises ConfigurationError for an unknown dtype, or one that models cannot compute in.
    """
    stated: Any = config.dtype
    found = getattr(torch, stated.removeprefix("torch."), None) if isinstance(stated, str) else stated
    if stated is None:
        return None
    if not isinstance(found, torch.dtype) or found not in COMPUTED_DTYPES:
        raise ConfigurationError(
            f'config.json has dtype={stated!r}, which models cannot compute in: pass dtype="bfloat16", "float16" or "float32"'
        )
    return found
