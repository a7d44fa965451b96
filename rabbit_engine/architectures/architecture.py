"""What a checkpoint's config says its model is, and the families that are turned into another class to be it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.transformers_bridge.weight_transforms import WeightTransform, as_values

RawConfig = Mapping[str, Any]
"""A config.json as it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The class to build, the config to build it from, and how the checkpoint's weights become its own.

    `family` is the converted family's name and `tokenizer` its tokenizer's, None for a class that reads its checkpoints itself.
    `transforms` stand before those of transformers, and are read in its way: all renamings in turn, then at most one
    converter. `quantization` is how the stored weights are quantised, which splitting undoes. `chat_ends` are tokens
    that end an answer beside eos: those at which the family's own `chat` stops. `positions` is how many a converted model
    computes as the family's own code does, with the reason; None is all of them.
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

    def conversion(self) -> list[Any] | None:
        """What is done to the stored weights beyond what the class itself does, as plain values: shards are made by it.

        None where that is nothing.
        """
        if not self.transforms and self.quantization is None:
            return None
        return [self.cls.__name__, [as_values(transform) for transform in self.transforms], self.quantization]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family without a class in transformers: how to know its checkpoints, what they become, and who has its tokenizer.

    `convert(raw, folder)` raises UnsupportedArchitectureError for what the class it becomes cannot keep. `tokenizer` is the
    name that `rabbit_engine.tokenization` knows it by; None where transformers loads its tokenizer.
    """

    name: str
    model_type: str
    classes: tuple[str, ...]
    becomes: str
    convert: Callable[[RawConfig, Path], Architecture]
    tokenizer: str | None = None

    def owns(self, raw: RawConfig) -> bool:
        """Whether a config.json is of this family, by the class it names; by its type where it names none."""
        named = raw.get("architectures")
        if isinstance(named, list) and named:
            return any(name in self.classes for name in named)
        return raw.get("model_type") == self.model_type
