"""The caller's changes to a checkpoint's config: another config, or overridden attributes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from rabbit_engine.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    RabbitError,
    UnsupportedArchitectureError,
    first_line,
)
from rabbit_engine.transformers_bridge.weight_transforms import WeightRenaming
from rabbit_engine.utils.foreign import foreign_code


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigOverrides:
    """`config` replaces the checkpoint's, `overrides` are attributes of it, and `key_mapping` renames stored weights.

    `code_revision` is the revision of code in another repo, which runs only with `trust_remote_code`.
    `auto` names the auto class that was asked for; None is what the checkpoint names.
    """

    config: PretrainedConfig | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    code_revision: str | None = None
    trust_remote_code: bool = False
    auto: str | None = None

    def renamings(self) -> tuple[WeightRenaming, ...]:
        """`key_mapping` as transformers' renamings."""
        return tuple(WeightRenaming(source, target) for source, target in self.key_mapping.items())


def read_given_config(place: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a file or folder. Raises CheckpointNotFoundError or UnsupportedArchitectureError."""
    if place.is_dir() and not (place / "config.json").is_file():
        raise CheckpointNotFoundError(f"config={str(place)!r} has no config.json")
    with foreign_code(lambda error: UnsupportedArchitectureError(f"config={str(place)!r} cannot be read: {first_line(error)}")):
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]


def override(config: PretrainedConfig, overrides: Mapping[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    """A copy of `config` with `overrides` set as by `PretrainedConfig.from_dict`, and those it has no attribute for.

    Raises ConfigurationError for a value that the config rejects.
    """
    changed, unknown = copy.deepcopy(config), {}
    for name, value in overrides.items():
        if name.startswith("_") or not hasattr(changed, name):
            unknown[name] = value
            continue
        with foreign_code(partial(_rejected, f"{type(config).__name__} rejects {name}={value!r}")):
            present = getattr(changed, name)
            if isinstance(present, PretrainedConfig) and isinstance(value, dict):
                value = type(present)(**{**present.to_dict(), **value})
            setattr(changed, name, value)
    return changed, unknown


def _rejected(told: str, error: Exception) -> RabbitError:
    return ConfigurationError(f"{told}: {first_line(error)}")
