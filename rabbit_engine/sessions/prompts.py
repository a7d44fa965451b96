"""Encodes messages and texts as token ids that fit, truncated only on request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from rabbit_engine.errors import PromptTooLongError
from rabbit_engine.sessions.encoding import Encoder

logger = logging.getLogger(__name__)

Message = Mapping[str, object]
Overflow = Literal["refuse", "truncate"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the tokens left for the answer, the number dropped from the prompt, and the model's inputs besides the ids:
    those of images."""

    ids: list[int]
    answer_tokens: int
    cut_tokens: int = 0
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """`most` tokens for prompt and answer together, or for each if an encoder reads the prompt `apart`. An answer has `usual`
    tokens unless a request says otherwise, or enough to make `whole` with its prompt: the generation config's `max_length`."""

    most: int
    usual: int
    whole: int | None = None
    apart: bool = False

    def room_for_prompt(self, asked: int | None) -> int:
        """The tokens a prompt may have, given those requested for the answer; with none requested the answer gets up to a
        quarter."""
        if self.apart:
            return self.most
        return self.most - (asked if asked is not None else min(self.usual, max(1, self.most // 4)))

    def room_for_answer(self, prompt: int) -> int:
        """The tokens that the answer to a prompt of this many may have."""
        return self.most - (1 if self.apart else prompt)

    def answer_tokens(self, prompt: int, asked: int | None) -> int:
        """The number of tokens the answer may have. Raises PromptTooLongError."""
        before = 1 if self.apart else prompt  # what a decoder begins with
        if max(prompt, before + (asked or 1)) > self.most:
            answer = f"{asked} of the answer" if asked is not None else "any of an answer"
            raise PromptTooLongError(
                f"{prompt} tokens of the prompt and {answer} are more than the {self.most} that fit: shorten the prompt, "
                "request fewer, allow truncation, or, if memory is the limit, load the model with a larger max_seq_len",
                tokens=max(prompt, before + (asked or 1)),
                most=self.most,
            )
        usual = self.usual if self.whole is None or self.whole <= before else self.whole - before
        return asked if asked is not None else min(usual, self.most - before)


def fit_text(ids: list[int], limits: Limits, asked: int | None, overflow: Overflow) -> Prompt:
    """A plain prompt; if it is too long and truncation is allowed, its beginning is dropped."""
    room = limits.room_for_prompt(asked)
    if overflow == "refuse" or len(ids) <= room or room < 1:
        return Prompt(ids, limits.answer_tokens(len(ids), asked))
    logger.warning("dropped the first %d of %d tokens of a prompt: there is room for %d", len(ids) - room, len(ids), room)
    return Prompt(ids[-room:], limits.answer_tokens(room, asked), len(ids) - room)


def fit_messages(
    encoder: Encoder,
    messages: Sequence[Message],
    limits: Limits,
    asked: int | None,
    overflow: Overflow,
    template: Mapping[str, object] | None = None,
) -> Prompt:
    """A conversation; if it is too long and truncation is allowed, its oldest turns are dropped (never the leading system
    messages), then the beginning of the last message."""
    template = template or {}
    ids = encoder.encode_messages(messages, template)
    room, whole = limits.room_for_prompt(asked), len(ids)
    if overflow == "refuse" or whole <= room:
        return Prompt(ids, limits.answer_tokens(whole, asked))
    kept = _last_turns(messages, lambda some: len(encoder.encode_messages(some, template)) <= room)
    ids = encoder.encode_messages(kept, template)
    while len(ids) > room and _shorten(encoder, kept[-1], len(ids) - room):
        ids = encoder.encode_messages(kept, template)
    logger.warning("dropped %d of %d tokens of a conversation: there is room for %d", whole - len(ids), whole, room)
    return Prompt(ids, limits.answer_tokens(len(ids), asked), whole - len(ids))


def _last_turns(messages: Sequence[Message], fits: Callable[[list[dict[str, object]]], bool]) -> list[dict[str, object]]:
    """The leading system messages and as many of the last turns as fit, at least one. A turn begins with the user's message,
    so the rest is still a conversation."""
    start = next((index for index, message in enumerate(messages) if message.get("role") not in ("system", "developer")), 0)
    turns = [index for index, message in enumerate(messages) if index >= start and message.get("role") == "user"]
    least, most = 0, max(0, len(turns) - 1)  # turns to drop: at most `most`

    def without(count: int) -> list[dict[str, object]]:
        rest = messages[turns[count] :] if turns else messages[start:]
        return [dict(message) for message in (*messages[:start], *rest)]

    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(without(middle)) else (middle + 1, most)
    return without(most)


def _shorten(encoder: Encoder, message: dict[str, object], excess: int) -> bool:
    """Drop `excess` tokens from the beginning of its text; False if none are left."""
    content = message.get("content")
    if not isinstance(content, str) or not content:
        return False
    message["content"] = encoder.leave_out(content, excess)
    return bool(message["content"])
