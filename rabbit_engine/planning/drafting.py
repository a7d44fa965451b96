"""Whether the memory of a draft gains more than the weights that would stay in it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rabbit_engine.planning.plan import Plan
from rabbit_engine.utils.sizes import format_seconds

TOKENS_A_PASS = 4.8
"""With 64 guesses by a model that agrees with two tokens of three, as measured."""

LOOKUP_IN_CHATS, LOOKUP_IN_SUMMARIES = 1.3, 4.6
"""Tokens a pass with guesses from the text itself, as measured: answers in a chat, summaries of a given text."""

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


def lookup_gain(plan: Plan) -> str:
    """What guesses from the text itself gain, which take no memory worth naming."""
    if not plan.pass_s:
        return "no guess pays: nothing moves"
    least, most = (format_seconds(plan.pass_s / tokens) for tokens in (LOOKUP_IN_CHATS, LOOKUP_IN_SUMMARIES))
    kinds = f"{LOOKUP_IN_CHATS:g} tokens a pass assumed in a chat, {LOOKUP_IN_SUMMARIES:g} in summaries of a given text"
    return f"about {least} to {most} a token instead of {format_seconds(plan.pass_s)} ({kinds})"


def gain_of(without: Plan, with_draft: Plan) -> DraftGain:
    """What the draft of `with_draft` gains over the plan `without` it, for guesses of assumed quality."""
    rate = _MEMORY_RATE.get(without.device.partition(":")[0], _ACCELERATOR_RATE)
    return DraftGain(without.pass_s, with_draft.pass_s, STEPS_A_PASS * with_draft.draft_bytes / rate)
