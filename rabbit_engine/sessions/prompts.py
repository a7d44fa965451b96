"""Messages and texts into token ids that fit, cut only where that was asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rabbit_engine.errors import PromptTooLongError
from rabbit_engine.sessions.encoding import Encoder

logger = logging.getLogger(__name__)

Message = Mapping[str, object]
Overflow = Literal["refuse", "truncate"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, how many the answer may have, and how many of the prompt were left out."""

    ids: list[int]
    answer_tokens: int
    cut_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """`most` tokens of prompt and answer together; an answer has `usual` unless another number is asked for, or as many as
    make `whole` with its prompt: the generation config's `max_length`."""

    most: int
    usual: int
    whole: int | None = None

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
        usual = self.usual if self.whole is None or self.whole <= prompt else self.whole - prompt
        return asked if asked is not None else min(usual, self.most - prompt)


def fit_text(ids: list[int], limits: Limits, asked: int | None, overflow: Overflow) -> Prompt:
    """A plain prompt; where it is too long and that is allowed, its beginning is left out."""
    room = limits.room_for_prompt(asked)
    if overflow == "refuse" or len(ids) <= room or room < 1:
        return Prompt(ids, limits.answer_tokens(len(ids), asked))
    logger.warning("the first %d of %d tokens of a prompt are left out: there is room for %d", len(ids) - room, len(ids), room)
    return Prompt(ids[-room:], limits.answer_tokens(room, asked), len(ids) - room)


def fit_messages(
    encoder: Encoder,
    messages: Sequence[Message],
    limits: Limits,
    asked: int | None,
    overflow: Overflow,
    template: Mapping[str, object] | None = None,
) -> Prompt:
    """A conversation; where it is too long and that is allowed, its oldest turns are left out, but for what the system
    says at its beginning, and then the beginning of the last message."""
    template = template or {}
    ids = encoder.encode_messages(messages, template)
    room, whole = limits.room_for_prompt(asked), len(ids)
    if overflow == "refuse" or whole <= room:
        return Prompt(ids, limits.answer_tokens(whole, asked))
    kept = _last_turns(messages, lambda some: len(encoder.encode_messages(some, template)) <= room)
    ids = encoder.encode_messages(kept, template)
    while len(ids) > room and _shorten(encoder, kept[-1], len(ids) - room):
        ids = encoder.encode_messages(kept, template)
    logger.warning("%d of %d tokens of a conversation are left out: there is room for %d", whole - len(ids), whole, room)
    return Prompt(ids, limits.answer_tokens(len(ids), asked), whole - len(ids))


def _last_turns(messages: Sequence[Message], fits: Callable[[list[dict[str, object]]], bool]) -> list[dict[str, object]]:
    """The system's messages at the beginning and as many of the last turns as fit, one at least; a turn begins with the
    user's message, so that what is left is a conversation still."""
    start = next((index for index, message in enumerate(messages) if message.get("role") not in ("system", "developer")), 0)
    turns = [index for index, message in enumerate(messages) if index >= start and message.get("role") == "user"]
    least, most = 0, max(0, len(turns) - 1)  # turns to leave out: `most` are enough, or nothing is

    def without(count: int) -> list[dict[str, object]]:
        rest = messages[turns[count] :] if turns else messages[start:]
        return [dict(message) for message in (*messages[:start], *rest)]

    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(without(middle)) else (middle + 1, most)
    return without(most)


def _shorten(encoder: Encoder, message: dict[str, object], excess: int) -> bool:
    """Leave out `excess` tokens at the beginning of its text; False when nothing is left to leave out."""
    content = message.get("content")
    if not isinstance(content, str) or not content:
        return False
    message["content"] = encoder.leave_out(content, excess)
    return bool(message["content"])
