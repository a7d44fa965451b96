"""config.json as it lies on disk: read with its damage named, before transformers or any class of a model sees it."""

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
_MOST, _MOST_LABELS = 10_000, 1_000_000
"""Of layers and experts, and of labels: ten times what any model has, and still listed in a moment."""

_UNUSED = "model_max_length"
"""Of tokenizers, where 10**30 is no limit; some are saved with the config too."""


def read_config(folder: Path) -> RawConfig:
    """config.json as it is written.

    Raises CheckpointNotFoundError where there is none, DamagedCheckpointError where it is no JSON object, and
    UnsupportedArchitectureError for a number of layers, experts or labels that no model has, or of more than 64 bits.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointNotFoundError(f"{folder} has no config.json: is it the folder of a model?")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({first_line(error)}): download it again") from error
    if not isinstance(raw, dict):
        raise DamagedCheckpointError(f"{path} holds a JSON {type(raw).__name__} where an object is wanted: download it again")
    for key, value in _numbers(raw):
        if value > (_MOST_LABELS if key.endswith("labels") else _MOST) and _COUNT.search(key):
            raise UnsupportedArchitectureError(f"{path} says {key}={value}: no model has so many; download it again")
        if isinstance(value, int) and not -(2**63) <= value < 2**63 and not key.endswith(_UNUSED):
            raise UnsupportedArchitectureError(f"{path} says {key}={value}, which 64 bits do not hold; download it again")
    return raw


def _numbers(raw: RawConfig) -> Iterator[tuple[str, float]]:
    """Every number of the config with its key, however deep."""
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
    """The dtype that a config says its weights have, None where it says none.

    Raises ConfigurationError for one that is no dtype, or that nothing can be computed in.
    """
    said: Any = config.dtype
    found = getattr(torch, said.removeprefix("torch."), None) if isinstance(said, str) else said
    if said is None:
        return None
    if not isinstance(found, torch.dtype) or found not in COMPUTED_DTYPES:
        raise ConfigurationError(
            f'config.json says dtype={said!r}, which models do not compute in: give dtype="bfloat16", "float16" or "float32"'
        )
    return found
