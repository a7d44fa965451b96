"""The text of one answer as its tokens come: pieces, stops, log probabilities, and the reply that it ends in."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from rabbit_engine.model.protocols import Decoder
from rabbit_engine.sessions.options import Options
from rabbit_engine.sessions.sampling import TokenLogprob
from rabbit_engine.sessions.text import TextFlow

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What came with one token: text that is certain now, often empty, and the token's log probability if it was asked for.
    The last piece may have no token: it is text that was held back."""

    text: str
    token: int | None = None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and what it took. `str(reply)` is its text.

    `finish_reason` is "stop" (it ended by itself, or at a stop text), "length" (at `max_new_tokens`) or "cancelled".
    `cut_tokens` of the prompt were left out because it was too long and truncation was asked for. `first_token_s` counts
    from when it was asked for, `seconds` too; both hold the time in the queue, `queued_s`.
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

    def __str__(self) -> str:
        return self.text

    @property
    def token_s(self) -> float:
        """Seconds a token after the first."""
        return (self.seconds - self.first_token_s) / (len(self.tokens) - 1) if len(self.tokens) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Ends:
    """Where an answer ends: at `tokens`, at the checkpoint's own `texts`, or when it has `most` tokens."""

    most: int
    tokens: Collection[int]
    texts: tuple[str, ...] = ()


class AnswerText:
    """Follows one answer: `on_piece` hears of the text that each token makes certain. Its clock starts when it is made."""

    def __init__(self, decoder: Decoder, options: Options, ends: Ends, on_piece: Callable[[Piece], None]) -> None:
        self._decoder, self._options, self._ends, self._on_piece = decoder, options, ends, on_piece
        self._flow = TextFlow(decoder, options.stop, include_stop=options.include_stop, skip_special=options.skip_special_tokens)
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._asked_s = perf_counter()
        self._began_s = self._first_s = 0.0

    def begin(self) -> None:
        """Its turn has come: it is not in the queue any more."""
        self._began_s = perf_counter()

    def take(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Take the next token in; True at a stop text."""
        self._first_s = self._first_s or perf_counter()
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        self._on_piece(Piece("" if self._is_silent(token) else self._flow.push(token), token, logprob))
        return self._flow.stopped

    def _is_silent(self, token: int) -> bool:
        return token in self._options.stop_token_ids and not self._options.include_stop

    def rest(self) -> str:
        """The text that was held back, once the last token is there."""
        return self._flow.end()

    def reply(self, prompt_tokens: int, cut_tokens: int = 0, *, cancelled: bool = False) -> Reply:
        """What it came to, after `rest`."""
        ended = self._flow.stopped or len(self._tokens) < self._ends.most or self._ends_itself()
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
        )

    def _ends_itself(self) -> bool:
        """Whether the last of as many tokens as there may be is one that ends an answer, or ends a text that does."""
        told = str(self._decoder.decode(self._tokens)) if self._ends.texts else ""
        return self._tokens[-1] in self._ends.tokens or told.endswith(self._ends.texts)
