"""Whether the memory of a draft gains more than the weights that would stay in it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rabbit_engine.planning.plan import Plan
from rabbit_engine.utils.sizes import format_seconds

TOKENS_A_PASS = 4.8
"""With 64 guesses by a model that agrees with two tokens of three, as measured."""

STEPS_A_PASS = 10
"""Passes of the draft for such a tree."""

_MEMORY_RATE = {"cpu": 10e9}
_ACCELERATOR_RATE = 500e9
"""Bytes per second at which a draft's weights are read from memory, by type of device: assumed, and low."""


@dataclass(frozen=True, slots=True)
class DraftGain:
    """Seconds of a pass without a draft and with it, of the guesses for one pass, and the tokens that it then gives."""

    plain_s: float
    pass_s: float
    guesses_s: float
    tokens: float = TOKENS_A_PASS

    @property
    def token_s(self) -> float:
        """Seconds a token with the draft."""
        return (self.pass_s + self.guesses_s) / self.tokens

    @property
    def pays(self) -> bool:
        """Whether tokens come sooner with the draft."""
        return self.token_s < self.plain_s

    def __str__(self) -> str:
        if not self.plain_s:
            return "everything fits without one: leave it out"
        seconds, plain = format_seconds(self.token_s), format_seconds(self.plain_s)
        parts = f"{format_seconds(self.pass_s)} a pass and {format_seconds(self.guesses_s)} for its guesses"
        end = "" if self.pays else ": leave it out"
        return f"about {seconds} a token instead of {plain} ({parts}, {self.tokens:g} tokens a pass assumed){end}"


def gain_of(without: Plan, with_draft: Plan) -> DraftGain:
    """What the draft of `with_draft` gains over the plan `without` it, for guesses of assumed quality."""
    rate = _MEMORY_RATE.get(without.device.partition(":")[0], _ACCELERATOR_RATE)
    return DraftGain(without.pass_s, with_draft.pass_s, STEPS_A_PASS * with_draft.draft_bytes / rate)
