"""Turns the tokens of one answer into text pieces, stops and log probabilities, and at the end into a reply."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from rabbit_engine.model.protocols import Decoder
from rabbit_engine.sessions.options import Options
from rabbit_engine.sessions.sampling import TokenLogprob
from rabbit_engine.sessions.text import TextFlow
from rabbit_engine.sessions.thinking import Thinking

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Piece:
    """The text that one token completed, often empty, and the token's log probability if requested.
    The last piece may have no token: it is text that was held back."""

    text: str
    token: int | None = None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer with its statistics. `str(reply)` is its text.

    `finish_reason` is "stop" (an end token, a stop text, or the end of what a constraint allows), "length" (`max_new_tokens`
    reached) or "cancelled". `cut_tokens` were dropped from a prompt that was too long, with truncation on. `first_token_s` and
    `seconds` count from the request and include the time in the queue, `queued_s`. `stop` is the text of `Options.stop` that
    ended the answer, None if none did. `answer` is the text without the reasoning before it, which begins at `answer_begins`.
    `cached_tokens` of the prompt were read from the prefix store, or computed once for a fork.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    cut_tokens: int = 0
    queued_s: float = 0.0
    first_token_s: float = 0.0
    seconds: float = 0.0
    stop: str | None = None
    answer_begins: int = 0
    cached_tokens: int = 0

    def __str__(self) -> str:
        return self.text

    @property
    def answer(self) -> str:
        """The text without the reasoning before it; empty if the reasoning did not end."""
        return self.text[self.answer_begins :]

    @property
    def token_s(self) -> float:
        """Seconds per token after the first."""
        return (self.seconds - self.first_token_s) / (len(self.tokens) - 1) if len(self.tokens) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Ends:
    """Where an answer ends: at any of `tokens`, at the checkpoint's own `texts`, or after `most` tokens."""

    most: int
    tokens: Collection[int]
    texts: tuple[str, ...] = ()


class AnswerText:
    """Follows one answer and calls `on_piece` with the text that each token completes. Its clock starts at construction."""

    def __init__(self, decoder: Decoder, options: Options, ends: Ends, on_piece: Callable[[Piece], None]) -> None:
        self._decoder, self._options, self._ends, self._on_piece = decoder, options, ends, on_piece
        self._flow = TextFlow(decoder, options.stop, include_stop=options.include_stop, skip_special=options.skip_special_tokens)
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._asked_s = perf_counter()
        self._began_s = self._first_s = 0.0

    def begin(self) -> None:
        """Mark the end of the time in the queue."""
        self._began_s = perf_counter()

    def take(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Add the next token; True at a stop text."""
        self._first_s = self._first_s or perf_counter()
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        self._on_piece(Piece("" if self._is_silent(token) else self._flow.push(token), token, logprob))
        return self._flow.stopped

    def _is_silent(self, token: int) -> bool:
        return token in self._options.stop_token_ids and not self._options.include_stop

    def rest(self) -> str:
        """The text still held back after the last token."""
        return self._flow.end()

    def reply(
        self,
        prompt_tokens: int,
        cut_tokens: int = 0,
        *,
        cancelled: bool = False,
        complete: bool = False,
        thinking: Thinking | None = None,
    ) -> Reply:
        """The finished answer, after `thinking`; `complete` means that nothing could follow. Call `rest` first."""
        ended = complete or self._flow.stopped or len(self._tokens) < self._ends.most or self._ends_itself()
        now = perf_counter()
        return Reply(
            self._flow.text,
            tuple(self._tokens),
            "cancelled" if cancelled else "stop" if ended else "length",
            prompt_tokens,
            logprobs=tuple(self._logprobs) if self._options.logprobs is not None else None,
            cut_tokens=cut_tokens,
            queued_s=(self._began_s or now) - self._asked_s,
            first_token_s=(self._first_s or now) - self._asked_s,
            seconds=now - self._asked_s,
            stop=self._flow.stop,
            answer_begins=0 if thinking is None else thinking.answer_begins(self._flow.text),
        )

    def _ends_itself(self) -> bool:
        """Whether the last allowed token is an end token, or completes a text that ends an answer."""
        told = str(self._decoder.decode(self._tokens)) if self._ends.texts else ""
        return self._tokens[-1] in self._ends.tokens or told.endswith(self._ends.texts)
