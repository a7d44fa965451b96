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
        if self.stride is not None:
            self.require_overlap(0)

    def require_overlap(self, special: int) -> None:
        """Raise ConfigurationError if windows, of which `special` tokens are the tokenizer's own, would not move on."""
        if self.stride is not None and not 0 <= self.stride < self.most - special:
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
        if isinstance(text, str):
            return [self.inputs(found) for found in self.find(text, pair, fit)]
        return [self.inputs(window) for window in _windows(read_ids(text), fit)]

    def find(self, text: str, pair: str | None, fit: Fit, **given: Any) -> list[Mapping[str, Any]]:
        """What the tokenizer gives for each window, also what is `given` to ask for. Raises as `encode`."""
        whole = self._call(text, pair, **given)
        tokens = len(whole["input_ids"])
        if tokens <= fit.most:
            return [whole]
        if fit.stride is None and not fit.truncation:
            raise PromptTooLongError(
                f"{tokens} tokens are more than the {fit.most} that fit: shorten the text, or give truncation=True, or stride= "
                "where windows can be joined"
            )
        if not isinstance(self._model.tokenizer, PreTrainedTokenizerBase):
            return _windows(whole["input_ids"], fit)
        if fit.stride is None:
            return [self._call(text, pair, truncation=True, max_length=fit.most, **given)]
        return self._split(text, pair, fit, given)

    def _split(self, text: str, pair: str | None, fit: Fit, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        tokenizer: Any = self._model.tokenizer
        if not tokenizer.is_fast:
            raise ConfigurationError(f"{type(tokenizer).__name__} cannot split a text into windows: give truncation=True")
        fit.require_overlap(tokenizer.num_special_tokens_to_add(pair is not None))
        sizes = {"truncation": True, "max_length": fit.most, "stride": fit.stride, "return_overflowing_tokens": True}
        found = self._call(text, pair, **sizes, **given)
        return [{name: values[index] for name, values in found.items()} for index in range(len(found["input_ids"]))]

    def ids(self, text: Text, *, special: bool) -> list[int]:
        """Token ids of a text of any length, with the tokenizer's special tokens or without; ids are returned unchanged."""
        if not isinstance(text, str):
            return read_ids(text)
        return list(self._call(text, None, **({} if special else {"add_special_tokens": False}))["input_ids"])

    def prompt_tokens(self, prompt: str) -> int:
        """The number of tokens that a prompt takes before a text, with the tokenizer's special tokens before it."""
        ids = self.ids(prompt, special=True)
        ends_special = bool(ids) and ids[-1] in getattr(self._model.tokenizer, "all_special_ids", ())
        return len(ids) - ends_special

    def inputs(self, found: Mapping[str, Any]) -> Inputs:
        """What a forward takes of it. Raises ConfigurationError if it has no tokens, or ids outside the vocabulary."""
        require_ids(found["input_ids"], self._vocabulary)
        return Inputs({name: list(found[name]) for name in _FIELDS if name in found})

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


_FIELDS = ("input_ids", "token_type_ids", "position_ids")


def _windows(ids: list[int], fit: Fit) -> list[Mapping[str, Any]]:
    """Token ids as they are, in windows without special tokens of their own."""
    if len(ids) <= fit.most or fit.truncation:
        return [{"input_ids": ids[: fit.most]}]
    if fit.stride is None:
        raise PromptTooLongError(f"{len(ids)} tokens are more than the {fit.most} that fit: shorten the text")
    step = fit.most - fit.stride
    return [{"input_ids": ids[start : start + fit.most]} for start in range(0, len(ids) - fit.stride, step)]
