"""What the caller wants of a checkpoint's config: another one, or some attributes of it changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from rabbit_engine.errors import CheckpointNotFoundError, ConfigurationError, UnsupportedArchitectureError, first_line
from rabbit_engine.transformers_bridge.weight_transforms import WeightRenaming


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """`config` stands in for the checkpoint's, `overrides` are attributes of it, and `key_mapping` renames stored weights.

    `code_revision` is of code in another repo, which runs with `trust_remote_code` alone.
    """

    config: PretrainedConfig | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    code_revision: str | None = None
    trust_remote_code: bool = False

    def renamings(self) -> tuple[WeightRenaming, ...]:
        """`key_mapping` as transformers reads it."""
        return tuple(WeightRenaming(source, target) for source, target in self.key_mapping.items())


def read_given_config(place: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a file or folder. Raises CheckpointNotFoundError or UnsupportedArchitectureError."""
    if place.is_dir() and not (place / "config.json").is_file():
        raise CheckpointNotFoundError(f"config={str(place)!r} has no config.json")
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]
    except Exception as error:  # the code of any config class meets any value
        raise UnsupportedArchitectureError(f"config={str(place)!r} cannot be read: {first_line(error)}") from error


def override(config: PretrainedConfig, overrides: Mapping[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    """A copy of `config` with the attributes it has set as `PretrainedConfig.from_dict` sets them, and what it does not have.

    Raises ConfigurationError for a value that the config refuses.
    """
    changed, unknown = copy.deepcopy(config), {}
    for name, value in overrides.items():
        if name.startswith("_") or not hasattr(changed, name):
            unknown[name] = value
            continue
        present = getattr(changed, name)
        try:
            if isinstance(present, PretrainedConfig) and isinstance(value, dict):
                value = type(present)(**{**present.to_dict(), **value})
            setattr(changed, name, value)
        except Exception as error:  # the code of any config class meets any value
            raise ConfigurationError(f"{name}={value!r} is refused by {type(config).__name__}: {first_line(error)}") from error
    return changed, unknown
