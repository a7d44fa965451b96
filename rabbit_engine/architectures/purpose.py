"""What a model class is for: the auto class of transformers that lists it, and the task as the Hub names it."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures.naming import auto_classes
from rabbit_engine.transformers_bridge.auto_classes import auto_class, auto_model_classes, classes_for

TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}
"""The tasks by auto class; a class that several list belongs to the first."""

_PREFIX = "AutoModelFor"


def auto_class_of(cls: type[PreTrainedModel], config: PretrainedConfig, folder: Path) -> str | None:
    """The name of the auto class that builds `cls` for `config`, from transformers or by the checkpoint's `auto_map`."""
    own = {reference.rpartition(".")[2]: auto for auto, reference in auto_classes(config, folder).items() if auto in TASKS}
    return own.get(cls.__name__) or next((auto for auto in _autos() if cls in classes_for(auto_class(auto), config)), None)


def auto_classes_for(config: PretrainedConfig) -> tuple[str, ...]:
    """The names of the auto classes of `TASKS` that have a class for `config`."""
    return tuple(auto for auto in TASKS if classes_for(auto_class(auto), config))


def task_of(auto: str | None) -> str | None:
    """`task_of("AutoModelForMaskedLM") -> "fill-mask"`; for a class that is not listed, its name: "audio-classification"."""
    if auto is None or auto in TASKS:
        return TASKS.get(auto or "")
    return "-".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", auto.removeprefix(_PREFIX))).lower()


def _autos() -> list[str]:
    return list(dict.fromkeys([*TASKS, *(auto.__name__ for auto in auto_model_classes())]))
