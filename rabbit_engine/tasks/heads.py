"""Which task a model's head is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rabbit_engine.errors import WrongHeadError
from rabbit_engine.transformers_bridge.auto_classes import auto_class, class_names

SEQUENCES = "AutoModelForSequenceClassification"
CAUSAL = "AutoModelForCausalLM"

_TASKS = {
    SEQUENCES: "labels of texts",
    "AutoModelForTokenClassification": "labels of tokens",
    CAUSAL: "the next token",
    "AutoModelForMaskedLM": "masked tokens",
    "AutoModelForImageTextToText": "the next token of texts with images",
    "AutoModelForSeq2SeqLM": "texts from texts",
    "AutoModelForQuestionAnswering": "answers within a text",
    "AutoModelForMultipleChoice": "a choice of several",
}
"""What the heads of an auto class compute."""


def has_head(model: object, auto: str) -> bool:
    """Whether a model's class is one of those that the auto class of this name builds, or remote code's of that name."""
    name = _class_name(model)
    return name in class_names(auto_class(auto)) or name.endswith(auto.removeprefix("AutoModel"))


def require_head(model: object, *autos: str) -> None:
    """Raise WrongHeadError, which names the head that the model has, unless it is one for a task of `autos`."""
    if any(has_head(model, auto) for auto in autos):
        return
    wanted = " or ".join(_TASKS[auto] for auto in autos)
    loads = " or ".join(autos)
    raise WrongHeadError(
        f"{_class_name(model)} has no head for {wanted}: {_what_it_has(model, autos)}. If the checkpoint has one, load it with "
        f"rabbit_engine.{loads}"
    )


def _what_it_has(model: object, autos: Sequence[str]) -> str:
    found = [task for auto, task in _TASKS.items() if auto not in autos and has_head(model, auto)]
    return f"its head computes {' or '.join(found)}" if found else "it computes hidden states only"


def base_of(model: Any) -> Any:
    """The model itself, also if PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _class_name(model: object) -> str:
    return type(base_of(model)).__name__
