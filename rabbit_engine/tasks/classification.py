"""Labels of texts from the logits of a classification head, as transformers' text-classification pipeline reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig

from rabbit_engine.errors import ConfigurationError

Logits = npt.NDArray[Any]
"""float32 [labels]."""


def _softmax(logits: Logits) -> Logits:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()  # type: ignore[no-any-return]


_ACTIVATIONS: Mapping[str, Callable[[Logits], Logits]] = MappingProxyType(
    {"softmax": _softmax, "sigmoid": lambda logits: 1 / (1 + np.exp(-logits)), "none": lambda logits: logits}
)
"""In numpy, for the pipeline's bits."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label and its score: a probability, or the logit itself for a regression."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Classification:
    """The scores of all labels of a text, the best first."""

    scores: tuple[LabelScore, ...]

    @property
    def label(self) -> str:
        """The best label."""
        return self.scores[0].label

    @property
    def score(self) -> float:
        """The score of the best label."""
        return self.scores[0].score


@dataclass(frozen=True, slots=True)
class Labeller:
    """The labels of a head by index, and what turns its logits into scores: "softmax", "sigmoid" or "none"."""

    labels: tuple[str, ...]
    activation: str

    def __post_init__(self) -> None:
        if self.activation not in _ACTIVATIONS:
            raise ConfigurationError(f"activation={self.activation!r}: expected one of {', '.join(_ACTIVATIONS)}")

    def read(self, logits: torch.Tensor) -> Classification:
        """Logits [labels] of a text. Raises ConfigurationError if the config names another number of labels."""
        if len(logits) != len(self.labels):
            raise ConfigurationError(f"the config names {len(self.labels)} labels, but the head has {len(logits)}: set id2label=")
        scores = _ACTIVATIONS[self.activation](logits.float().cpu().numpy()).tolist()
        found = [LabelScore(label, score) for label, score in zip(self.labels, scores, strict=True)]
        return Classification(tuple(sorted(found, key=lambda pair: -pair.score)))


def labeller_of(config: PretrainedConfig, activation: str | None = None) -> Labeller:
    """The labeller of a config. Its `problem_type`, else the number of labels, decide the activation if none is given."""
    names: Mapping[int, str] = getattr(config, "id2label", None) or {}
    labels = tuple(str(names.get(index, f"LABEL_{index}")) for index in range(config.num_labels or 0))
    return Labeller(labels, activation or _usual_activation(config))


def _usual_activation(config: PretrainedConfig) -> str:
    if config.problem_type == "regression":
        return "none"
    multi_label = config.problem_type == "multi_label_classification"
    return "sigmoid" if multi_label or config.num_labels == 1 else "softmax"
