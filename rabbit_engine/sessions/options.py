"""What a request asks of an answer, and the same as keywords of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rabbit_engine.errors import ConfigurationError

MOST_ALTERNATIVES = 20
"""Log probabilities of so many tokens a position at most, as OpenAI's interface has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to answer. None leaves a choice to the checkpoint's own generation config.

    Args:
        max_new_tokens: tokens at most; None is the checkpoint's own, else what the session says.
        temperature: below 0.001 is greedy; above, the logits are divided by it and a token is drawn.
        top_p: draw from the likeliest tokens of this total probability, in (0, 1].
        top_k: draw from so many likeliest tokens.
        min_p: draw from tokens that are at least this share as likely as the likeliest.
        seed: draw as `torch.manual_seed(seed)` before `generate` would, whoever else is served.
        stop: texts at which the answer ends; they are not part of it.
        logprobs: log probabilities of the tokens, and of so many of the likeliest at each position, 0 to 20.
        repetition_penalty: transformers' own (Keskar et al., CTRL, 2019); 1 is none.
        presence_penalty: taken from the logit of every token that the answer has, -2 to 2 (OpenAI's definition).
        frequency_penalty: taken from it as often as the answer has the token, -2 to 2.
        logit_bias: added to the logits of token ids, -100 to 100.

    Any of temperature above 0, top_p, top_k, min_p and seed makes the answer a drawn one.
    Raises ConfigurationError for a value out of range.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigurationError(f"{name}={value!r} is out of range: {least:g} to {most:g}")
        if self.top_p == 0:
            raise ConfigurationError("top_p=0 leaves no token to draw: use temperature=0 for the likeliest")
        if not all(isinstance(stop, str) for stop in self.stop):
            raise ConfigurationError("stop is a text or several")
        if not all(self.stop):
            raise ConfigurationError("an empty stop text would end every answer before it begins")
        if any(abs(bias) > 100 for bias in self.logit_bias.values()):
            raise ConfigurationError("logit_bias is from -100 to 100")

    @property
    def _is_cold(self) -> bool:
        return self.temperature is not None and self.temperature < _COLDEST

    @property
    def draws(self) -> bool | None:
        """Whether tokens are drawn; None leaves it to the checkpoint."""
        if self._is_cold:
            return False
        asked = (self.temperature, self.top_p, self.top_k, self.min_p, self.seed)
        return True if any(value is not None for value in asked) else None

    def keywords(self) -> dict[str, Any]:
        """The part of them that `generate` takes as it is."""
        found: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1}
        if self.draws is not None:
            found["do_sample"] = self.draws
        names = ("top_p", "top_k", "min_p", "repetition_penalty", *(() if self._is_cold else ("temperature",)))
        found |= {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            found["sequence_bias"] = {(token,): float(bias) for token, bias in self.logit_bias.items()}
        return found


_COLDEST = 1e-3
"""Logits that are divided by less overflow."""

_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_new_tokens", 1, 2**31),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", 1, 2**31),
    ("min_p", 0, 1),
    ("seed", -(2**63), 2**64 - 1),
    ("logprobs", 0, MOST_ALTERNATIVES),
    ("repetition_penalty", 0.01, 100),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
)

NAMES = tuple(option.name for option in fields(Options))
