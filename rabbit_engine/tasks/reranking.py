"""How relevant documents are to a query: by a cross-encoder's single label, or a causal model's "yes" or "no"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from rabbit_engine.errors import ConfigurationError, WrongHeadError
from rabbit_engine.tasks.batches import Inputs

_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "none"}

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""What a document is judged by, unless the caller says otherwise."""

_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""The template of Qwen3-Reranker's model card."""


@dataclass(frozen=True, slots=True)
class Relevance:
    """Document `index` and its score, from 0 to 1 unless the checkpoint says otherwise; `logit` is what the head computed."""

    index: int
    score: float
    logit: float


def cross_encoder_activation(config: PretrainedConfig) -> str:
    """What turns the label's logit into a score: "sigmoid", or "none" where sentence-transformers' entry in the config says so.

    Raises WrongHeadError for a head of several labels, ConfigurationError for another function.
    """
    if config.num_labels != 1:
        raise WrongHeadError(f"the head has {config.num_labels} labels, relevance has one: use classify with pairs of texts")
    listed = getattr(config, "sentence_transformers", None) or {}
    named = listed.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None) or "Sigmoid"
    found = _ACTIVATIONS.get(str(named).rpartition(".")[2])
    if found is None:
        raise ConfigurationError(f'the config names {named} for scores, which is not supported: give activation="none"')
    return found


def activate(logit: float, activation: str) -> float:
    """The score of a logit."""
    if activation not in _ACTIVATIONS.values():
        raise ConfigurationError(f'activation={activation!r}: expected "sigmoid" or "none"')
    return logit if activation == "none" else 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


@dataclass(frozen=True, slots=True)
class YesOrNo:
    """Prompts that a causal model answers with the token `yes` or `no`: `before` and `after` go around query and document."""

    yes: int
    no: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    def prompt(self, judged: Sequence[int]) -> Inputs:
        """The inputs for the tokens of instruction, query and document."""
        return Inputs({"input_ids": [*self.before, *judged, *self.after]}, logits=1)

    @property
    def own_tokens(self) -> int:
        """Its tokens around them."""
        return len(self.before) + len(self.after)

    def logit(self, logits: torch.Tensor) -> float:
        """From the logits [vocabulary] after a prompt, those of "yes" less "no": its sigmoid is the probability of "yes" among
        both."""
        return float(logits[self.yes].float() - logits[self.no].float())


def judged_text(instruction: str, query: str, document: str) -> str:
    """What a causal model judges."""
    return f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


def yes_or_no(tokenizer: Any) -> YesOrNo:
    """The prompts of Qwen3-Reranker. Raises WrongHeadError for a tokenizer without their tokens."""
    known = tokenizer.get_vocab()
    if not {"yes", "no", "<|im_start|>", "<|im_end|>"} <= set(known):
        raise WrongHeadError(
            "a causal model ranks documents only in the way of Qwen3-Reranker, whose tokens this one's tokenizer lacks: load a "
            "cross-encoder with AutoModelForSequenceClassification"
        )
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (_BEFORE, _AFTER))
    return YesOrNo(known["yes"], known["no"], tuple(before), tuple(after))
