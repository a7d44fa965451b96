"""Reasoning that a model writes before its answer, between marks that its chat template knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))

_LAST = 8
"""The tokens at a prompt's end that can hold a mark."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """The marks around reasoning. `begun`: the prompt itself ends with the first one, so that the answer begins inside."""

    begin: str
    close: str
    begun: bool = False

    def answer_begins(self, text: str) -> int:
        """Where the answer begins in a text that may have reasoning before it; its length while the reasoning goes on."""
        if not self.begun and not text.lstrip().startswith(self.begin):
            return 0
        at = text.find(self.close)
        return len(text) if at < 0 else len(text) - len(text[at + len(self.close) :].lstrip())


def thinking_of(tokenizer: Any, prompt: Sequence[int]) -> Thinking | None:
    """The reasoning that may come before the answer to a conversation; None if the chat template knows none."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    marks = next((marks for marks in MARKS if marks[1] in template), None)
    return None if marks is None else Thinking(*marks, begun=_end_of(tokenizer, prompt).endswith(marks[0]))


def thinking_before_form(tokenizer: Any, prompt: Sequence[int], *, continues: bool) -> Thinking | None:
    """The same for an answer that must have a form, which begins after the reasoning.

    None also where the prompt has ended the reasoning, where it `continues` an answer, and for marks that are special tokens,
    which texts leave out: then the form begins at once.
    """
    found = thinking_of(tokenizer, prompt)
    if found is None or found.begun:
        is_free = found is not None
    else:
        is_free = not continues and not _end_of(tokenizer, prompt).endswith(found.close)
    special = {str(token.content) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special}
    return found if found is not None and is_free and not {found.begin, found.close} & special else None


def _end_of(tokenizer: Any, prompt: Sequence[int]) -> str:
    return str(tokenizer.decode(prompt[-_LAST:])).rstrip()
