"""Encodes texts and conversations as valid token ids, without tokenising what cannot fit."""

from __future__ import annotations

import copy
import functools
import json
import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from rabbit_engine.errors import CannotGenerateError, ConfigurationError, PromptTooLongError, first_line
from rabbit_engine.model.protocols import SessionModel, TextTokenizer
from rabbit_engine.sessions.call_ids import Messages, with_fitting_ids
from rabbit_engine.tokenization.ranks import byte_characters
from rabbit_engine.utils.foreign import foreign_code

_PREFIX_CHARACTERS = 4
"""Characters per token of room that are tokenised first when a text is long; doubled until they suffice."""

_COMPOSED_CHARACTERS = 4
"""Unicode's composition (NFC) joins up to this many characters into one."""


class Encoder:
    """Encodes for one model and leaves its tokenizer unchanged. Thread-safe.

    A text that must have more than `most` tokens is rejected by its length or its beginning alone; None tokenises all of it.
    """

    def __init__(self, model: SessionModel, vocabulary: int, most: int | None) -> None:
        self._model, self._vocabulary, self._most = model, vocabulary, most
        self._setting_up = threading.Lock()
        self._lengths: tuple[TextTokenizer | None, TokenLengths] = None, TokenLengths()

    def encode_text(self, text: str | Sequence[int], *, special: bool = True) -> list[int]:
        """Token ids of a plain prompt, with the tokenizer's special tokens unless `special` is False; ids are returned unchanged.

        Raises ConfigurationError for an empty prompt or ids outside the vocabulary; PromptTooLongError.
        """
        return self._checked(self._tokens(text, special=special) if isinstance(text, str) else read_ids(text))

    def encode_messages(
        self, messages: Sequence[Mapping[str, object]], template: Mapping[str, object], *, bounded: bool = True
    ) -> list[int]:
        """Token ids of a conversation, up to where the answer begins; `template` (tools, for example) goes to the chat template.
        One that is too long is rejected early only if `bounded`.

        Raises ConfigurationError if the model has no template or the template rejects the messages; PromptTooLongError.
        """
        tokenizer = self._model.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigurationError("this model has no chat template, it only continues texts: use generate, or /v1/completions")
        if not messages:
            raise ConfigurationError("there are no messages to answer")
        plain = getattr(type(tokenizer), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template
        given = {"add_generation_prompt": not template.get("continue_final_message"), **template}

        def render(messages: Messages) -> Any:
            return tokenizer.apply_chat_template(
                copy.deepcopy(list(messages)), tokenize=not plain, return_dict=not plain, **given
            )

        rejects = "the chat template rejects these messages"
        with foreign_code(lambda error: ConfigurationError(f"{rejects}: {error}")), self._turn(tokenizer):
            found = with_fitting_ids(render, messages)
        if not plain:
            return self._checked([int(token) for token in found["input_ids"]])
        return self._checked(self._tokens(found, special=False) if bounded else self._encode(tokenizer, found, special=False))

    def leave_out(self, text: str, tokens: int) -> str:
        """The text without its first `tokens` tokens."""
        tokenizer = self._model.tokenizer
        return str(tokenizer.decode(self._encode(tokenizer, text, special=False)[tokens:]))

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        tokenizer = self._model.tokenizer
        encode = functools.partial(self._encode, tokenizer, special=special)
        if self._most is not None:
            self._refuse_long(text, self._lengths_of(tokenizer).fewest_tokens(text))
            size = _PREFIX_CHARACTERS * self._most
            while size < len(text):
                self._refuse_long(text, len(encode(text[:size])) * 2 // 3)  # cutting may have added a few tokens
                size *= 2
        return encode(text)

    def _lengths_of(self, tokenizer: TextTokenizer) -> TokenLengths:
        known, lengths = self._lengths
        if known is not tokenizer:  # callers may replace the tokenizer
            lengths = read_token_lengths(tokenizer)
            self._lengths = tokenizer, lengths
        return lengths

    def _refuse_long(self, text: str, least: int) -> None:
        if self._most is not None and least > self._most:
            raise PromptTooLongError(
                f"a prompt of {len(text)} characters has at least {least} tokens, but only {self._most} fit: "
                "shorten it, or, if memory is the limit, load the model with a larger max_seq_len",
                tokens=least,
                most=self._most,
            )

    def _encode(self, tokenizer: TextTokenizer, text: str, *, special: bool) -> list[int]:
        quiet = {"verbose": False} if isinstance(tokenizer, PreTrainedTokenizerBase) else {}
        try:
            with self._turn(tokenizer):
                return list(tokenizer(text, **quiet, **({} if special else {"add_special_tokens": False}))["input_ids"])
        except (UnicodeError, TypeError, ValueError) as error:
            raise ConfigurationError(f"the tokenizer cannot read this text: {first_line(error)}") from error

    @contextmanager
    def _turn(self, tokenizer: TextTokenizer) -> Iterator[None]:
        """Let many threads use a tokenizer of the Rust library, set up by one; others serve one thread at a time."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        with self._setting_up:
            if not isinstance(backend, Tokenizer):
                yield
                return
            if backend.truncation is not None:
                backend.no_truncation()
            if backend.padding is not None:
                backend.no_padding()
        yield

    def _checked(self, ids: list[int]) -> list[int]:
        require_ids(ids, self._vocabulary)
        return ids


def require_text_generation(model: SessionModel) -> None:
    """Raise CannotGenerateError for a class that does not generate, or not from a text."""
    kind = type(model).__name__
    if not model.can_generate():
        raise CannotGenerateError(f"{kind} does not generate text")
    reads = getattr(model, "main_input_name", "input_ids")
    if model.config.is_encoder_decoder and reads != "input_ids":
        raise CannotGenerateError(
            f"{kind} reads {reads}, not a text: prepare it with its processor, and call model.generate({reads}=...)"
        )


def require_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Raise ConfigurationError for an empty prompt or ids outside the vocabulary."""
    if not ids:
        raise ConfigurationError("the prompt has no tokens: there is nothing to continue")
    wrong = next((token for token in (min(ids), max(ids)) if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ConfigurationError(f"token id {wrong} is not in the vocabulary of {vocabulary}")


def read_ids(given: object) -> list[int]:
    """Token ids from a list, tuple, tensor [length] or array of integers. Raises ConfigurationError for anything else."""
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, list | tuple | range):
        raise ConfigurationError(f"a prompt is a text or a list of token ids, not a value of type {type(given).__name__}")
    if set(map(type, values)) <= {int}:
        return list(values)
    wrong = next((value for value in values if isinstance(value, bool) or not hasattr(value, "__index__")), None)
    try:
        if wrong is None:
            return [operator.index(value) for value in values]
    except TypeError:
        wrong = values
    raise ConfigurationError(f"a prompt is a text or a list of token ids: {repr(wrong)[:40]} is not a token id")


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """The most characters one token can stand for, and the characters that are dropped because they have no token."""

    longest: float = float("inf")
    dropped: str = ""

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the text's tokens; 0 if unknown."""
        return int((len(text) - sum(map(text.count, self.dropped))) / self.longest)


def read_token_lengths(tokenizer: TextTokenizer) -> TokenLengths:
    """Read them from the vocabulary of a byte-level BPE, which splits any word into bytes if need be.

    Other kinds have no bound: a whole unknown word may be one token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer) or not isinstance(backend.model, models.BPE):
        return TokenLengths()
    normalizer = json.loads(backend.normalizer.__getstate__())["type"] if backend.normalizer is not None else None
    splitter = backend.pre_tokenizer.__getstate__() if backend.pre_tokenizer is not None else b""
    swallows = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())  # any number of spaces
    vocabulary, signs = backend.get_vocab(), byte_characters()
    if (
        swallows
        or b"ByteLevel" not in splitter
        or normalizer not in (None, "NFC")
        or not set(signs[0x80:0xC0]) <= set(vocabulary)
    ):
        return TokenLengths()
    longest = max(map(len, vocabulary)) * (_COMPOSED_CHARACTERS if normalizer == "NFC" else 1)
    return TokenLengths(longest, "".join(chr(byte) for byte in range(0x80) if signs[byte] not in vocabulary))
