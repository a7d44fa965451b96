"""Whether the memory of a draft gains more than the weights that would stay in it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rabbit_engine.planning.plan import Plan
from rabbit_engine.utils.sizes import format_seconds

TOKENS_WITH_MODEL = 4.8
"""Tokens a pass with 64 guesses by a model that agrees with two tokens of three, as measured."""

TOKENS_WITH_HEADS = 1.8
"""With one guess by a multi-token head: DeepSeek-V3's is right in 85 to 90 of 100 cases (DeepSeek-AI, 2024, section 5.4.3)."""

LOOKUP_IN_CHATS, LOOKUP_IN_SUMMARIES = 1.3, 4.6
"""Tokens a pass with guesses from the text itself, as measured: answers in a chat, summaries of a given text."""

STEPS_A_PASS = 10
"""Passes of the draft for such a tree."""

_MEMORY_RATE = {"cpu": 10e9}
_ACCELERATOR_RATE = 500e9
"""Bytes per second at which a draft's weights are read from memory, by type of device: assumed, and low."""


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What a draft takes: bytes of memory, and seconds of guessing for a pass that then gives `tokens`, by assumed guesses."""

    nbytes: int = 0
    guesses_s: float = 0.0
    tokens: float = LOOKUP_IN_CHATS

    def joined(self, other: DraftCost) -> DraftCost:
        """Of both drafts; the tokens are those of the better one."""
        return DraftCost(self.nbytes + other.nbytes, self.guesses_s + other.guesses_s, max(self.tokens, other.tokens))


def cost_of_model(nbytes: int, device_type: str) -> DraftCost:
    """Of a model of that size in memory."""
    rate = _MEMORY_RATE.get(device_type, _ACCELERATOR_RATE)
    return DraftCost(nbytes, STEPS_A_PASS * nbytes / rate, TOKENS_WITH_MODEL)


def cost_of_heads(plan: Plan) -> DraftCost:
    """Of multi-token heads that run by that plan, once for each pass."""
    return DraftCost(plan.device_bytes, plan.pass_s, TOKENS_WITH_HEADS)


@dataclass(frozen=True, slots=True)
class DraftGain:
    """Seconds of a pass without a draft and with it, of the guesses for one pass, and the tokens that it then gives."""

    plain_s: float
    pass_s: float
    guesses_s: float
    tokens: float = TOKENS_WITH_MODEL

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


def gain_of(without: Plan, with_draft: Plan, cost: DraftCost) -> DraftGain:
    """What a draft of that cost gains, as planned without it and with it."""
    return DraftGain(without.pass_s, with_draft.pass_s, cost.guesses_s, cost.tokens)
