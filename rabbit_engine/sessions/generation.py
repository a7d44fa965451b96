"""The tokens of one answer, by transformers' `generate`: the end tokens, criteria and logits processors of a request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from rabbit_engine.errors import ConfigurationError, RabbitError, first_line
from rabbit_engine.model.protocols import SessionModel, TextTokenizer
from rabbit_engine.sessions.answer import Ends
from rabbit_engine.sessions.options import Options
from rabbit_engine.sessions.sampling import LogprobRecorder, Penalties, TokenLogprob
from rabbit_engine.transformers_bridge.generation import refused_by_generate

TakeToken = Callable[[int, TokenLogprob | None], bool]
"""Hears of every token, with its log probability where that was asked for, and says whether the answer ends there."""


class Generation(StoppingCriteria):
    """Generates one answer, and hands each token to `take`.

    It is a stopping criterion, not a streamer: `generate` asks criteria first, and a stop that is seen a token later
    costs a whole pass.
    """

    def __init__(self, model: SessionModel, prompt: list[int], options: Options, ends: Ends, take: TakeToken) -> None:
        self._model, self._prompt, self._options = model, prompt, options
        self._ends, self._take = ends, take
        self._recorder = None if options.logprobs is None else LogprobRecorder(options.logprobs)
        self._has_begun = False

    def run(self) -> None:
        """Generate: `model.generate` with what was asked for. Raises ConfigurationError for settings that it refuses."""
        try:
            self._generate()
        except RabbitError:
            raise
        except ValueError as error:
            if self._has_begun or not refused_by_generate(error):
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
            max_new_tokens=self._ends.most,
            max_length=None,  # the checkpoint's is in `max_new_tokens` already
            eos_token_id=sorted(self._ends.tokens) or None,
            pad_token_id=_pad_token(self._model, self._ends.tokens),
            stopping_criteria=[self],
            logits_processor=self._processors(),
            **_one_by_one(self._model.generation_config),
            **_cold(self._model.generation_config, self._options),
            **self._options.keywords(),
            **_add_to_checkpoint(self._model, self._options),
        )

    def _processors(self) -> list[LogitsProcessor]:
        options = self._options
        found: list[LogitsProcessor] = []
        if options.presence_penalty or options.frequency_penalty:
            found.append(Penalties(options.presence_penalty, options.frequency_penalty, len(self._prompt)))
        return [*found, self._recorder] if self._recorder is not None else found

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:  # noqa: ARG002
        """Hand the newest of `input_ids` [1, length] on; True [1] where the answer ends there."""
        self._has_begun = True
        token = int(input_ids[0, -1])
        stops = self._take(token, None if self._recorder is None else self._recorder.of(token))
        return torch.full((1,), stops, dtype=torch.bool, device=input_ids.device)


def ends_of(model: SessionModel, options: Options, most: int) -> Ends:
    """Where an answer ends: at the request's tokens, and unless they are ignored at the generation config's and the
    tokenizer's own; at the generation config's texts; with `most` tokens."""
    config, asked = model.generation_config, set(options.stop_token_ids)
    strings = config.stop_strings or ()
    texts = (strings,) if isinstance(strings, str) else tuple(strings)
    if options.ignore_eos:
        return Ends(most, asked, texts)
    found = config.eos_token_id
    ends = set() if found is None else {found} if isinstance(found, int) else set(found)
    own = getattr(model.tokenizer, "eos_token_id", None)
    return Ends(most, {int(token) for token in (ends if own is None else ends | {own}) if token >= 0} | asked, texts)


def _pad_token(model: SessionModel, ends: Collection[int]) -> int | None:
    """The model's own padding token, the tokenizer's, or else one that ends an answer: nothing is ever padded with it here,
    and `generate` warns where there is none."""
    for found in (model.generation_config.pad_token_id, getattr(model.tokenizer, "pad_token_id", None)):
        if isinstance(found, int) and found >= 0:
            return found
    return min(ends, default=None)


def _add_to_checkpoint(model: SessionModel, options: Options) -> dict[str, Any]:
    """Biases and bad words of a request, and those of the generation config, which `generate` would leave out for them."""
    config, found = model.generation_config, dict[str, Any]()
    if options.logit_bias:
        given = config.sequence_bias or {}
        bias = {tuple(ids): value for ids, value in (given.items() if isinstance(given, dict) else given)}
        for token, value in options.logit_bias.items():
            bias[(token,)] = bias.get((token,), 0.0) + float(value)
        found["sequence_bias"] = bias
    if options.bad_words:
        found["bad_words_ids"] = [*(config.bad_words_ids or []), *_bad_word_ids(model.tokenizer, options.bad_words)]
    return found


def _bad_word_ids(tokenizer: TextTokenizer, words: Sequence[str]) -> list[list[int]]:
    """Token ids of each word at the beginning of a text, and after a space."""
    texts = [text for word in words for text in (word, f" {word.lstrip()}")]
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [one for index, one in enumerate(ids) if one and one not in ids[:index]]


def _cold(config: GenerationConfig, options: Options) -> dict[str, bool]:
    """A temperature of 0 is greedy, also where the checkpoint says it."""
    return {"do_sample": False} if config.temperature == 0 and options.temperature is None and options.draws is None else {}


def _one_by_one(config: GenerationConfig) -> dict[str, Any]:
    """The checkpoint's ways to guess several tokens, switched off: criteria would be asked about guesses that are not taken.
    Greedy text is the same without them."""
    off = {"prompt_lookup_num_tokens": None, "assistant_early_exit": None, "use_mtp": False}
    return {name: value for name, value in off.items() if getattr(config, name, None)}
