"""One answer: generated in the engine's thread, heard of in any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

import torch
from transformers import LogitsProcessor, StoppingCriteria

from rabbit_engine.errors import ConfigurationError, RabbitError, first_line
from rabbit_engine.sessions.options import Options
from rabbit_engine.sessions.sampling import LogprobRecorder, Penalties, TokenLogprob
from rabbit_engine.sessions.text import TextFlow
from rabbit_engine.transformers_bridge.generation import refused_by_generate

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


class Answer(StoppingCriteria):
    """Generates one text and follows it as it grows; `on_piece` hears of every token.

    It is a stopping criterion, not a streamer: `generate` asks criteria first, and a stop that is seen a token later
    costs a whole pass.
    """

    def __init__(
        self, model: Any, prompt: list[int], options: Options, max_new_tokens: int, on_piece: Callable[[Piece], None]
    ) -> None:
        self._model, self._prompt, self._options = model, prompt, options
        self._max_new_tokens = max_new_tokens
        self._on_piece = on_piece
        self._flow = TextFlow(
            model.tokenizer, options.stop, include_stop=options.include_stop, skip_special=options.skip_special_tokens
        )
        self._ends = (set() if options.ignore_eos else end_tokens(model)) | set(options.stop_token_ids)
        self._recorder = None if options.logprobs is None else LogprobRecorder(options.logprobs)
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._asked_s = perf_counter()
        self._began_s = self._first_s = 0.0

    def run(self) -> None:
        """Generate: `model.generate` with what was asked for. Raises ConfigurationError for settings that it refuses."""
        self._began_s = perf_counter()
        try:
            self._generate()
        except RabbitError:
            raise
        except ValueError as error:
            if self._tokens or not refused_by_generate(error):
                raise
            raise ConfigurationError(
                f"generate refuses these settings: {first_line(error)}; they are the request's and the checkpoint's "
                "(generation_config.json)"
            ) from error

    def _generate(self) -> None:
        ids = torch.tensor([self._prompt], device=self._model.device)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._max_new_tokens,
            max_length=None,  # the checkpoint's is in `max_new_tokens` already
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=pad_token(self._model, self._ends),
            stopping_criteria=[self],
            logits_processor=self._processors(),
            **_one_by_one(self._model.generation_config),
            **_cold(self._model.generation_config, self._options),
            **self._options.keywords(),
            **add_to_checkpoint(self._model, self._options),
        )

    def _processors(self) -> list[LogitsProcessor]:
        options = self._options
        found: list[LogitsProcessor] = []
        if options.presence_penalty or options.frequency_penalty:
            found.append(Penalties(options.presence_penalty, options.frequency_penalty, len(self._prompt)))
        return [*found, self._recorder] if self._recorder is not None else found

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Take in the newest of `input_ids` [1, length]; True [1] at a stop text."""
        token = int(input_ids[0, -1])
        self._first_s = self._first_s or perf_counter()
        self._tokens.append(token)
        logprob = None if self._recorder is None else self._recorder.of(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        self._on_piece(Piece("" if self._is_silent(token) else self._flow.push(token), token, logprob))
        return torch.full((1,), self._flow.stopped, dtype=torch.bool, device=input_ids.device)

    def _is_silent(self, token: int) -> bool:
        return token in self._options.stop_token_ids and not self._options.include_stop

    def rest(self) -> str:
        """The text that was held back, once the last token is there."""
        return self._flow.end()

    def reply(self, *, cancelled: bool = False) -> Reply:
        """What it came to, after `rest`."""
        ended = self._flow.stopped or len(self._tokens) < self._max_new_tokens or self._ends_itself()
        reason: FinishReason = "cancelled" if cancelled else "stop" if ended else "length"
        now = perf_counter()
        reply = Reply(self._flow.text, tuple(self._tokens), reason, len(self._prompt), seconds=now - self._asked_s)
        return replace(
            reply,
            logprobs=tuple(self._logprobs) if self._recorder is not None else None,
            queued_s=(self._began_s or now) - self._asked_s,
            first_token_s=(self._first_s or now) - self._asked_s,
        )

    def _ends_itself(self) -> bool:
        """Whether the last of as many tokens as there may be is one that ends an answer, or ends a text that does."""
        strings = self._model.generation_config.stop_strings or ()
        told = self._model.tokenizer.decode(self._tokens) if strings else ""
        return self._tokens[-1] in self._ends or told.endswith((strings,) if isinstance(strings, str) else tuple(strings))


def add_to_checkpoint(model: Any, options: Options) -> dict[str, Any]:
    """Biases and bad words of a request beside those of the generation config, which `generate` would leave out for them."""
    config, found = model.generation_config, dict[str, Any]()
    if options.logit_bias:
        given = config.sequence_bias or {}
        bias = {tuple(ids): value for ids, value in (given.items() if isinstance(given, dict) else given)}
        for token, value in options.logit_bias.items():
            bias[(token,)] = bias.get((token,), 0.0) + float(value)
        found["sequence_bias"] = bias
    if options.bad_words:
        found["bad_words_ids"] = [*(config.bad_words_ids or []), *bad_word_ids(model.tokenizer, options.bad_words)]
    return found


def bad_word_ids(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """Token ids of each word at the beginning of a text, and after a space."""
    texts = [text for word in words for text in (word, f" {word.lstrip()}")]
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [one for index, one in enumerate(ids) if one and one not in ids[:index]]


def _cold(config: Any, options: Options) -> dict[str, Any]:
    """A temperature of 0 is greedy, also where the checkpoint says it."""
    return {"do_sample": False} if config.temperature == 0 and options.temperature is None and options.draws is None else {}


def _one_by_one(config: Any) -> dict[str, Any]:
    """The checkpoint's ways to guess several tokens, switched off: criteria would be asked about guesses that are not taken.
    Greedy text is the same without them."""
    off = {"prompt_lookup_num_tokens": None, "assistant_early_exit": None, "use_mtp": False}
    return {name: value for name, value in off.items() if getattr(config, name, None)}


def end_tokens(model: Any) -> set[int]:
    """The tokens that end an answer: the generation config's, and the tokenizer's own."""
    found = model.generation_config.eos_token_id
    ends = set() if found is None else {found} if isinstance(found, int) else set(found)
    own = getattr(model.tokenizer, "eos_token_id", None)
    return {int(token) for token in (ends if own is None else ends | {own}) if token >= 0}


def pad_token(model: Any, ends: set[int]) -> int | None:
    """The model's own padding token, the tokenizer's, or else one that ends an answer: nothing is ever padded with it here,
    and `generate` warns where there is none."""
    for found in (model.generation_config.pad_token_id, getattr(model.tokenizer, "pad_token_id", None)):
        if isinstance(found, int) and found >= 0:
            return found
    return min(ends, default=None)
