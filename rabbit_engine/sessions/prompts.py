"""Messages and texts into token ids that fit, cut only where that was asked for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rabbit_engine.errors import ConfigurationError, PromptTooLongError

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Overflow = Literal["refuse", "truncate"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, how many the answer may have, and how many of the prompt were left out."""

    ids: list[int]
    answer_tokens: int
    cut_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """`most` tokens of prompt and answer together; an answer has `usual` unless another number is asked for."""

    most: int
    usual: int

    def room_for_prompt(self, asked: int | None) -> int:
        """Tokens that a prompt may have when the answer is to have `asked`; without, it leaves the answer a quarter at most."""
        return self.most - (asked if asked is not None else min(self.usual, max(1, self.most // 4)))

    def answer_tokens(self, prompt: int, asked: int | None) -> int:
        """How many the answer may have. Raises PromptTooLongError."""
        if prompt + (asked or 1) > self.most:
            answer = f"{asked} of the answer" if asked is not None else "any of an answer"
            raise PromptTooLongError(
                f"{prompt} tokens of the prompt and {answer} are more than the {self.most} that there is room for: shorten "
                "it, ask for fewer, let it be truncated, or load the model with a larger max_seq_len if memory is the limit"
            )
        return asked if asked is not None else min(self.usual, self.most - prompt)


def encode_text(tokenizer: Any, text: str | Sequence[int], vocabulary: int) -> list[int]:
    """Token ids of a plain prompt, with the special tokens the tokenizer adds; ids are taken as they are.

    Raises ConfigurationError for a prompt without tokens, or with ids that are not below `vocabulary`.
    """
    ids = list(tokenizer(text)["input_ids"]) if isinstance(text, str) else [int(token) for token in text]
    if not ids:
        raise ConfigurationError("the prompt has no tokens: there is nothing to go on from")
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ConfigurationError(f"token id {wrong} is not in the vocabulary of {vocabulary}")
    return ids


def encode_messages(tokenizer: Any, messages: Sequence[Message], template: Mapping[str, Any]) -> list[int]:
    """Token ids of a conversation, up to where the answer begins; `template` goes to the chat template (tools and the like).

    Raises ConfigurationError where there is no template, or where it refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigurationError("this model has no chat template: it continues texts; use generate, or /v1/completions")
    if not messages:
        raise ConfigurationError("there are no messages to answer")
    try:
        found = tokenizer.apply_chat_template(
            copy.deepcopy(list(messages)), add_generation_prompt=True, tokenize=True, return_dict=True, **template
        )
    except Exception as error:
        raise ConfigurationError(f"the chat template refuses these messages: {error}") from error
    return [int(token) for token in found["input_ids"]]


def fit_text(ids: list[int], limits: Limits, asked: int | None, overflow: Overflow) -> Prompt:
    """A plain prompt; where it is too long and that is allowed, its beginning is left out."""
    room = limits.room_for_prompt(asked)
    if overflow == "refuse" or len(ids) <= room or room < 1:
        return Prompt(ids, limits.answer_tokens(len(ids), asked))
    logger.warning("the first %d of %d tokens of a prompt are left out: there is room for %d", len(ids) - room, len(ids), room)
    return Prompt(ids[-room:], limits.answer_tokens(room, asked), len(ids) - room)


def fit_messages(
    tokenizer: Any,
    messages: Sequence[Message],
    limits: Limits,
    asked: int | None,
    overflow: Overflow,
    template: Mapping[str, Any] | None = None,
) -> Prompt:
    """A conversation; where it is too long and that is allowed, its oldest turns are left out, but for what the system
    says at its beginning, and then the beginning of the last message."""
    template = template or {}
    ids = encode_messages(tokenizer, messages, template)
    room, whole = limits.room_for_prompt(asked), len(ids)
    if overflow == "refuse" or whole <= room:
        return Prompt(ids, limits.answer_tokens(whole, asked))
    kept = _last_turns(messages, lambda some: len(encode_messages(tokenizer, some, template)) <= room)
    ids = encode_messages(tokenizer, kept, template)
    while len(ids) > room and _shorten(tokenizer, kept[-1], len(ids) - room):
        ids = encode_messages(tokenizer, kept, template)
    logger.warning("%d of %d tokens of a conversation are left out: there is room for %d", whole - len(ids), whole, room)
    return Prompt(ids, limits.answer_tokens(len(ids), asked), whole - len(ids))


def _last_turns(messages: Sequence[Message], fits: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """The system's messages at the beginning and as many of the last turns as fit, one at least; a turn begins with the
    user's message, so that what is left is a conversation still."""
    start = next((index for index, message in enumerate(messages) if message.get("role") not in ("system", "developer")), 0)
    turns = [index for index, message in enumerate(messages) if index >= start and message.get("role") == "user"]
    least, most = 0, max(0, len(turns) - 1)  # turns to leave out: `most` are enough, or nothing is

    def without(count: int) -> list[dict[str, Any]]:
        rest = messages[turns[count] :] if turns else messages[start:]
        return [dict(message) for message in (*messages[:start], *rest)]

    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(without(middle)) else (middle + 1, most)
    return without(most)


def _shorten(tokenizer: Any, message: dict[str, Any], excess: int) -> bool:
    """Leave out so many tokens at the beginning of its text; False when there is nothing to leave out."""
    content = message.get("content")
    if not isinstance(content, str) or not content:
        return False
    tokens = tokenizer(content, add_special_tokens=False)["input_ids"]
    message["content"] = tokenizer.decode(tokens[excess:]) if len(tokens) > excess else ""
    return bool(message["content"])
