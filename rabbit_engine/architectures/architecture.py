"""The architecture that a checkpoint's config describes, and the families that are converted to another class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.transformers_bridge.weight_transforms import WeightTransform, as_values

RawConfig = Mapping[str, Any]
"""The contents of a config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The class to build, the config to build it from, and how the checkpoint's weights become its own.

    `family` and `tokenizer` name a converted family and its tokenizer; None for a class that reads its own checkpoints.
    `transforms` are applied before those of transformers and by its rules: all renamings in order, then at most one
    converter. `quantization` describes how the stored weights are quantised; splitting dequantises them. `chat_ends` are
    token ids that end an answer in addition to EOS: those at which the family's own `chat` stops. `positions` is the number
    of positions up to which a converted model matches the family's own code, with the reason; None is no limit. `new_head`:
    the checkpoint names another class, and may lack this one's head.
    """

    cls: type[PreTrainedModel]
    config: PretrainedConfig
    family: str | None = None
    tokenizer: str | None = None
    transforms: tuple[WeightTransform, ...] = ()
    quantization: Mapping[str, Any] | None = None
    chat_ends: tuple[int, ...] = ()
    positions: int | None = None
    positions_reason: str = ""
    new_head: bool = False

    def conversion(self) -> list[Any] | None:
        """How stored weights are changed beyond what the class itself does, as plain values for a split's fingerprint.

        None if they are not.
        """
        if not self.transforms and self.quantization is None:
            return None
        return [self.cls.__name__, [as_values(transform) for transform in self.transforms], self.quantization]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family without a class in transformers: how to recognise its checkpoints, the class they become, and their tokenizer.

    `convert(raw, folder)` raises UnsupportedArchitectureError for a config that the target class cannot represent. `tokenizer`
    is its name in `rabbit_engine.tokenization`; None if transformers loads its tokenizer.
    """

    name: str
    model_type: str
    classes: tuple[str, ...]
    becomes: str
    convert: Callable[[RawConfig, Path], Architecture]
    tokenizer: str | None = None

    def owns(self, raw: RawConfig) -> bool:
        """Whether a config.json belongs to this family: by the class it names, or by its model type if it names none."""
        named = raw.get("architectures")
        if isinstance(named, list) and named:
            return any(name in self.classes for name in named)
        return raw.get("model_type") == self.model_type
