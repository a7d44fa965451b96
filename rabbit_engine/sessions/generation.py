"""Generates the tokens of one answer with transformers' `generate`: its end tokens, criteria and logits processors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria

from rabbit_engine.errors import ConfigurationError, RabbitError, first_line
from rabbit_engine.model.protocols import SessionModel, TextTokenizer
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.speculating import Speculate
from rabbit_engine.model.tiered_caches import make_cache, make_growing_cache, making_pairs
from rabbit_engine.planning.demand import Demand
from rabbit_engine.sessions.answer import Ends
from rabbit_engine.sessions.beginnings import Beginning
from rabbit_engine.sessions.constraints import CompiledConstraint, ConstrainedTokens
from rabbit_engine.sessions.known_prefixes import KnownText
from rabbit_engine.sessions.last_text import LastText
from rabbit_engine.sessions.options import Options
from rabbit_engine.sessions.prompts import Prompt
from rabbit_engine.sessions.sampling import LogprobRecorder, Penalties, TokenLogprob
from rabbit_engine.transformers_bridge.generation import makes_dynamic_cache, own_cache, refused_by_generate

if TYPE_CHECKING:
    from rabbit_engine.sessions.held import HeldPrefix

TakeToken = Callable[[int, TokenLogprob | None], bool]
"""Takes each token, with its log probability if requested, and returns whether the answer ends there."""


class Generation(StoppingCriteria):
    """Generates one answer and passes each token to `take`.

    It is a stopping criterion, not a streamer: `generate` calls criteria first, and noticing a stop one token later costs
    a whole pass.
    """

    def __init__(
        self,
        model: SessionModel,
        prompt: Prompt,
        options: Options,
        ends: Ends,
        take: TakeToken,
        speculate: Speculate = None,
        constraint: CompiledConstraint | None = None,
        demand: Demand | None = None,
        beginning: Beginning | None = None,
        held: HeldPrefix | None = None,
        last: LastText | None = None,
    ) -> None:
        self._model, self._prompt, self._options = model, prompt, options
        self._ends, self._take = ends, take
        self._recorder = None if options.logprobs is None else LogprobRecorder(options.logprobs)
        self._speculate: dict[str, Speculate] = {} if speculate is None else {"speculate": speculate}
        self._demand = demand
        self._part_rows = {} if demand is None or demand.chunk is None else {"prefill_chunk_size": demand.chunk}
        self._constrained: ConstrainedTokens | None = None if constraint is None else constraint.processor()
        self._has_begun = False
        self._held = held
        self._beginning = beginning
        self._known: KnownText | None = None
        self._last, self._begun = last, 0
        self._ids: torch.Tensor | None = None
        self.is_complete = False
        """Whether the constraint allowed nothing after the last token."""

    def run(self) -> None:
        """Call `model.generate` with the request's options. Raises ConfigurationError for settings that it rejects."""
        try:
            self._generate()
        except RabbitError:
            raise
        except ValueError as error:
            if self._has_begun or not refused_by_generate(error):
                raise
            raise ConfigurationError(
                f"generate rejects these settings: {first_line(error)}; they are the request's and the checkpoint's "
                "(generation_config.json)"
            ) from error
        finally:
            if self._beginning is not None:
                self._beginning.end()

    def _generate(self) -> None:
        ids = torch.tensor([self._prompt.ids], device=self._model.device)
        cache = self._continue_last()
        cache = self.make_cache() if cache is None else cache
        if self._beginning is not None and (known := self._beginning.begin(cache, self._begun)) is not None:
            self._known, cache = known, known.cache
        with self._leaving(cache), making_pairs(self._model, self._demand):
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **self._prompt.inputs,
                max_new_tokens=self._ends.most,
                max_length=None,  # `max_new_tokens` already includes the checkpoint's
                eos_token_id=sorted(self._ends.tokens) or None,
                pad_token_id=_pad_token(self._model, self._ends.tokens),
                stopping_criteria=[self],
                logits_processor=self._processors(),
                **one_by_one(self._model.generation_config),
                **_cold(self._model.generation_config, self._options),
                **self._options.keywords(),
                **_add_to_checkpoint(self._model, self._options),
                **self._speculate,
                **self._part_rows,
                **own_cache(self._model.forward, cache),
            )

    def make_cache(self) -> DynamicCache | None:
        """The cache to begin with; None leaves it to `generate`."""
        if self._held is not None:
            return self._held.copy(len(self._prompt.ids) + self._ends.most)
        if self._demand is None:
            return None
        runtime = runtime_of(self._model)
        found = make_cache(runtime, self._demand)
        if found is None and not self._prompt.inputs and makes_dynamic_cache(self._model.generation_config):
            found = make_growing_cache(runtime, self._demand)
            if found is None and self._last is not None:  # to have it afterwards
                found = DynamicCache(config=self._model.config.get_text_config())
        return found

    def _continue_last(self) -> DynamicCache | None:
        """The cache of the text that ended last, if the prompt begins with more of it than is stored."""
        if self._last is None or self._demand is None:
            return None
        stored = 0 if self._beginning is None else self._beginning.stored_tokens
        found = self._last.take(self._prompt.ids, self._demand, stored)
        cache, self._begun = (None, 0) if found is None else found
        return cache

    @contextmanager
    def _leaving(self, cache: DynamicCache | None) -> Iterator[None]:
        """A block that leaves the cache to the next text."""
        is_whole = False
        try:
            yield
            is_whole = True
        finally:
            is_free = self._known is None or not self._known.is_awaited
            if self._last is not None and self._demand is not None and is_free:
                ids = self._prompt.ids if self._ids is None else self._ids[0].tolist()
                self._last.put(ids, cache, self._demand, is_whole=is_whole)

    @property
    def cached_tokens(self) -> int:
        """The tokens of the prompt that were read from the prefix store, or computed for another text or a fork."""
        if self._held is not None:
            return len(self._held.ids)
        return self._begun if self._known is None else self._known.tokens

    def _processors(self) -> list[LogitsProcessor]:
        options = self._options
        found: list[LogitsProcessor] = []
        if options.presence_penalty or options.frequency_penalty:
            found.append(Penalties(options.presence_penalty, options.frequency_penalty))
        own = (self._recorder, self._constrained)  # log probabilities are those before the constraint
        return [*found, *(each for each in own if each is not None)]

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:  # noqa: ARG002
        """Pass on the newest of `input_ids` [1, length]; True [1] where the answer ends."""
        self._has_begun, self._ids = True, input_ids
        token = int(input_ids[0, -1])
        stops = self._take(token, None if self._recorder is None else self._recorder.of(token))
        if self._known is not None:
            self._known.keep()
        self.is_complete = self._constrained is not None and self._constrained.is_complete(input_ids)[0]
        return torch.full((1,), stops or self.is_complete, dtype=torch.bool, device=input_ids.device)


def ends_of(model: SessionModel, options: Options, most: int) -> Ends:
    """Where an answer ends: at the request's tokens, at those of the generation config and the tokenizer unless ignored, at
    the generation config's texts, or after `most` tokens."""
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
    """The padding token of the model or the tokenizer, or else an end token. Nothing is padded with it, but `generate`
    warns without one."""
    for found in (model.generation_config.pad_token_id, getattr(model.tokenizer, "pad_token_id", None)):
        if isinstance(found, int) and found >= 0:
            return found
    return min(ends, default=None)


def _add_to_checkpoint(model: SessionModel, options: Options) -> dict[str, Any]:
    """The request's biases and bad words, with those of the generation config, which `generate` would otherwise drop."""
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
    """Token ids of each word at the start of a text, and after a space."""
    texts = [text for word in words for text in (word, f" {word.lstrip()}")]
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [one for index, one in enumerate(ids) if one and one not in ids[:index]]


def _cold(config: GenerationConfig, options: Options) -> dict[str, bool]:
    """Temperature 0 means greedy, also if the checkpoint sets it."""
    return {"do_sample": False} if config.temperature == 0 and options.temperature is None and options.draws is None else {}


def one_by_one(config: GenerationConfig) -> dict[str, Any]:
    """Switches off the checkpoint's speculative decoding: criteria would see guesses that are then rejected. Greedy text
    is the same without it."""
    off = {"prompt_lookup_num_tokens": None, "assistant_early_exit": None, "use_mtp": False}
    return {name: value for name, value in off.items() if getattr(config, name, None)}
