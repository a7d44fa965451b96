"""The options of a request, and their equivalents as keywords of transformers' `generate`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.sessions.constraints.spec import Constraint, constraint_of

MOST_ALTERNATIVES = 20
"""The most log probabilities per position, as in OpenAI's API."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to answer. None leaves a choice to the checkpoint's generation config.

    Args:
        max_new_tokens: the most tokens; None uses the checkpoint's value, or else the session's.
        temperature: greedy below 0.001; otherwise the logits are divided by it and tokens are sampled.
        top_p: sample from the likeliest tokens with this total probability, in (0, 1].
        top_k: sample from this many of the likeliest tokens; 0 samples from all, whatever the checkpoint sets.
        min_p: sample from tokens at least this fraction as likely as the likeliest.
        seed: sample as after `torch.manual_seed(seed)`, whatever other requests run.
        stop: texts that end the answer; they are not part of it.
        stop_token_ids: tokens that end the answer, in addition to the checkpoint's; the one reached is in `Reply.tokens`, not
            in the text.
        include_stop: keep the stop text, or the text of the stop token, in the answer.
        ignore_eos: continue past end tokens, up to `max_new_tokens`.
        min_new_tokens: the least tokens before an end token.
        bad_words: texts that the answer must not contain; their last token gets no probability.
        skip_special_tokens: False keeps the names of special tokens in the text.
        logprobs: return log probabilities of the tokens, and of this many of the likeliest at each position, 0 to 20.
        typical_p: transformers' own (Meister et al., 2022), in (0, 1].
        epsilon_cutoff, eta_cutoff: transformers' own (Hewitt et al., 2022), in [0, 1).
        no_repeat_ngram_size: no sequence of this length is repeated; 0 allows any.
        repetition_penalty: transformers' own (Keskar et al., CTRL, 2019); 1 has no effect.
        presence_penalty: subtracted from the logit of every token already in the answer, -2 to 2 (OpenAI's definition).
        frequency_penalty: subtracted once per occurrence of the token in the answer, -2 to 2.
        logit_bias: added to the logits of token ids, -100 to 100.
        schema: the answer is JSON of this schema: a dict, JSON text, a class of pydantic's, or True for any object.
        regex: the answer matches this regular expression from its beginning to its end.
        choices: the answer is one of these texts.
        grammar: the answer follows this grammar: Lark's in llguidance's dialect, GBNF, or a `Constraint`.

    At most one of schema, regex, choices and grammar. A temperature above 0, top_p, top_k, min_p, typical_p, a cutoff or a seed
    turns sampling on. Raises ConfigurationError for a value out of range, ConstraintError for what is no schema, regex, choices
    or grammar.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    min_new_tokens: int | None = None
    bad_words: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    logprobs: int | None = None
    no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    schema: Any = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    grammar: str | Constraint | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        object.__setattr__(self, "stop_token_ids", tuple(map(_token_id, self.stop_token_ids)))
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise ConfigurationError(f"{name}={value!r} is not a number: give one from {least:g} to {most:g}")
            if value is not None and not least <= value <= most:
                raise ConfigurationError(f"{name}={value!r} is out of range: {least:g} to {most:g}")
        self._require_types()
        for name in ("top_p", "typical_p"):
            if getattr(self, name) == 0:
                raise ConfigurationError(f"{name}=0 leaves no token to sample: use temperature=0 for the likeliest")
        if self.min_new_tokens is not None and self.min_new_tokens > (self.max_new_tokens or math.inf):
            raise ConfigurationError(f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}")

        if self.constraint is not None and self.ignore_eos:
            raise ConfigurationError("ignore_eos=True continues past the end of an answer, which a constraint does not allow")

    @property
    def constraint(self) -> Constraint | None:
        """What the answer must be."""
        return constraint_of(schema=self.schema, regex=self.regex, choices=self.choices, grammar=self.grammar)

    def _require_types(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and not isinstance(value, numbers.Integral):
                raise ConfigurationError(f"{name}={value!r} is not an integer")
        for name in ("include_stop", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name}={getattr(self, name)!r} is neither True nor False")
        _check_bias(self.logit_bias)

    @property
    def _is_cold(self) -> bool:
        return self.temperature is not None and self.temperature < _COLDEST

    @property
    def draws(self) -> bool | None:
        """Whether to sample; None leaves it to the checkpoint."""
        if self._is_cold:
            return False
        asked = (self.temperature, self.seed, self.top_k or None)  # top_k=0 removes a restriction
        others = (getattr(self, name) for name in _DRAWING if name != "top_k")
        return True if any(value is not None for value in (*asked, *others)) else None

    def keywords(self) -> dict[str, Any]:
        """The options that `generate` takes unchanged, whatever the checkpoint sets."""
        found: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1}
        if self.draws is not None:
            found["do_sample"] = self.draws
        names = (*_DRAWING, *_SHAPING, *(() if self._is_cold else ("temperature",)))
        return found | {name: value for name in names if (value := getattr(self, name)) is not None}


def _texts(name: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """A text or several, none of them empty."""
    found = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(text, str) for text in found):
        raise ConfigurationError(f"{name} must be a text or a list of texts")
    if not all(found):
        raise ConfigurationError(f"{name} contains an empty text, which would match at once")
    return found


def _check_bias(given: object) -> None:
    if not isinstance(given, Mapping) or not all(isinstance(token, numbers.Integral) for token in given):
        raise ConfigurationError(f"logit_bias={given!r} does not map token ids to numbers")
    if not all(_is_number(bias) and abs(bias) <= 100 for bias in given.values()):
        raise ConfigurationError("values of logit_bias must be from -100 to 100")


def _token_id(given: object) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise ConfigurationError(f"stop_token_ids must be integers, not {given!r}")
    return given


_DRAWING = ("top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_SHAPING = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real)


_COLDEST = 1e-3
"""Logits divided by less overflow."""

_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_new_tokens", 1, 2**31),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", 0, 2**31),
    ("min_p", 0, 1),
    ("typical_p", 0, 1),
    ("epsilon_cutoff", 0, 0.999999),
    ("eta_cutoff", 0, 0.999999),
    ("min_new_tokens", 0, 2**31),
    ("no_repeat_ngram_size", 0, 2**31),
    ("seed", -(2**63), 2**64 - 1),
    ("logprobs", 0, MOST_ALTERNATIVES),
    ("repetition_penalty", 0.01, 100),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
)

_WHOLE = ("max_new_tokens", "top_k", "min_new_tokens", "no_repeat_ngram_size", "seed", "logprobs")

NAMES = tuple(option.name for option in fields(Options))
