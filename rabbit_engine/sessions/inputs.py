"""Encodes texts as the inputs of a forward: whole, truncated, or as windows that overlap."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rabbit_engine.errors import ConfigurationError, PromptTooLongError, first_line
from rabbit_engine.model.protocols import SessionModel, TextTokenizer
from rabbit_engine.sessions.encoding import read_ids, require_ids
from rabbit_engine.tasks.batches import Inputs

Text = str | Sequence[int]
"""A text, or its token ids."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What happens to a text of more than `most` tokens: it is refused, truncated, or split into windows that share `stride`
    tokens with the one before."""

    most: int
    truncation: bool = False
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.stride is not None and self.truncation:
            raise ConfigurationError("a long text is either truncated or split into windows: give truncation= or stride=")
        if self.stride is not None and not 0 <= self.stride < self.most - 2:
            raise ConfigurationError(f"stride={self.stride}: windows have {self.most} tokens, and must overlap by fewer")


class InputEncoder:
    """Encodes with a copy of the model's tokenizer, so that truncating changes nothing for others. Thread-safe."""

    def __init__(self, model: SessionModel, vocabulary: int) -> None:
        self._model, self._vocabulary = model, vocabulary
        self._lock = threading.Lock()
        self._copied: tuple[TextTokenizer, Any] | None = None

    def encode(self, text: Text, pair: str | None, fit: Fit) -> list[Inputs]:
        """The windows of a text, or of a pair of texts: one unless it is too long and may be split.

        Raises PromptTooLongError; ConfigurationError for a text without tokens, or ids outside the vocabulary.
        """
        if not isinstance(text, str):
            return [self._checked(window) for window in _windows(read_ids(text), fit)]
        whole = self._call(text, pair)
        if len(whole["input_ids"]) <= fit.most:
            return [self._checked(whole)]
        if fit.stride is None and not fit.truncation:
            raise PromptTooLongError(
                f"{len(whole['input_ids'])} tokens are more than the {fit.most} that fit: shorten the text, or give "
                "truncation=True, or stride= where windows can be joined"
            )
        if not isinstance(self._model.tokenizer, PreTrainedTokenizerBase):
            return [self._checked(window) for window in _windows(whole["input_ids"], fit)]
        found = self._call(text, pair, truncation=True, max_length=fit.most, **_overflow(fit))
        if fit.stride is None:
            return [self._checked(found)]
        count = len(found["input_ids"])
        return [self._checked({name: found[name][index] for name in _FIELDS if name in found}) for index in range(count)]

    def call(self, text: str, **given: Any) -> Any:
        """What the tokenizer returns for a text, whatever its length."""
        return self._call(text, None, **given)

    def _call(self, text: str, pair: str | None, **given: Any) -> Any:
        with self._lock:
            tokenizer = self._copy()
            quiet = {"verbose": False} if isinstance(tokenizer, PreTrainedTokenizerBase) else {}
            try:
                return tokenizer(*((text,) if pair is None else (text, pair)), **quiet, **given)
            except (UnicodeError, TypeError, ValueError) as error:
                raise ConfigurationError(f"the tokenizer cannot read this text: {first_line(error)}") from error

    def _copy(self) -> Any:
        own = self._model.tokenizer
        if self._copied is None or self._copied[0] is not own:  # callers may replace it
            self._copied = own, copy.deepcopy(own)
        return self._copied[1]

    def _checked(self, found: Mapping[str, Any]) -> Inputs:
        require_ids(found["input_ids"], self._vocabulary)
        return Inputs({name: list(found[name]) for name in _FIELDS if name in found})


_FIELDS = ("input_ids", "token_type_ids", "position_ids")


def _overflow(fit: Fit) -> dict[str, object]:
    return {} if fit.stride is None else {"stride": fit.stride, "return_overflowing_tokens": True}


def _windows(ids: list[int], fit: Fit) -> list[dict[str, list[int]]]:
    """Token ids as they are, in windows without special tokens of their own."""
    if len(ids) <= fit.most or fit.truncation:
        return [{"input_ids": ids[: fit.most]}]
    if fit.stride is None:
        raise PromptTooLongError(f"{len(ids)} tokens are more than the {fit.most} that fit: shorten the text")
    step = fit.most - fit.stride
    return [{"input_ids": ids[start : start + fit.most]} for start in range(0, len(ids) - fit.stride, step)]
