"""Run Hugging Face models that do not fit your memory: one decoder layer at a time, with transformers' own answer."""

from importlib import import_module
from typing import TYPE_CHECKING

from rabbit_engine.errors import RabbitError

if TYPE_CHECKING:
    from rabbit_engine.batches import batch
    from rabbit_engine.decoding import DraftModel, Lookup, Merged, MultiTokenHeads, SelfDraft
    from rabbit_engine.model import AutoModel, StreamingMixin
    from rabbit_engine.model.auto_classes import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
        AutoModelForMultipleChoice,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForSpeechSeq2Seq,
        AutoModelForTokenClassification,
    )
    from rabbit_engine.model.capabilities import Capabilities, capabilities
    from rabbit_engine.planning.plan import Plan
    from rabbit_engine.prefixes import PrefixStore
    from rabbit_engine.sessions import Options, Reply, Session
    from rabbit_engine.sessions.constrained import constrain
    from rabbit_engine.sessions.llm import LLM
    from rabbit_engine.sessions.params import SamplingParams
    from rabbit_engine.streaming import Profile

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForTokenClassification",
    "Capabilities",
    "DraftModel",
    "Lookup",
    "Merged",
    "MultiTokenHeads",
    "Options",
    "Plan",
    "PrefixStore",
    "Profile",
    "RabbitError",
    "Reply",
    "SamplingParams",
    "SelfDraft",
    "Session",
    "StreamingMixin",
    "batch",
    "capabilities",
    "constrain",
]

_HOMES = {
    "LLM": "sessions.llm",
    "AutoModel": "model",
    "AutoModelForCausalLM": "model.auto_classes",
    "AutoModelForImageClassification": "model.auto_classes",
    "AutoModelForImageTextToText": "model.auto_classes",
    "AutoModelForMaskedLM": "model.auto_classes",
    "AutoModelForMultipleChoice": "model.auto_classes",
    "AutoModelForQuestionAnswering": "model.auto_classes",
    "AutoModelForSeq2SeqLM": "model.auto_classes",
    "AutoModelForSequenceClassification": "model.auto_classes",
    "AutoModelForSpeechSeq2Seq": "model.auto_classes",
    "AutoModelForTokenClassification": "model.auto_classes",
    "Capabilities": "model.capabilities",
    "DraftModel": "decoding",
    "Lookup": "decoding",
    "Merged": "decoding",
    "MultiTokenHeads": "decoding",
    "Options": "sessions",
    "Plan": "planning.plan",
    "PrefixStore": "prefixes",
    "Profile": "streaming",
    "Reply": "sessions",
    "SamplingParams": "sessions.params",
    "SelfDraft": "decoding",
    "Session": "sessions",
    "StreamingMixin": "model",
    "batch": "batches",
    "capabilities": "model.capabilities",
    "constrain": "sessions.constrained",
}
"""The module of each name that is imported on first use: most of them load torch and transformers."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
