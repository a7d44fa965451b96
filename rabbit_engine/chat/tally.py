"""Totals over the answers of a session."""

from __future__ import annotations

from dataclasses import dataclass

from rabbit_engine.sessions import Reply
from rabbit_engine.utils.sizes import format_seconds


@dataclass(slots=True)
class Tally:
    """Sums over answers. Seconds are those to the first token, and those of all later ones."""

    answers: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    later_tokens: int = 0
    first_s: float = 0.0
    later_s: float = 0.0

    def add(self, reply: Reply) -> None:
        """Add an answer, unless it has no tokens."""
        if reply.tokens:
            self.answers += 1
            self.prompt_tokens += reply.prompt_tokens
            self.tokens += len(reply.tokens)
            self.later_tokens += len(reply.tokens) - 1
            self.first_s += reply.first_token_s
            self.later_s += reply.seconds - reply.first_token_s

    def __str__(self) -> str:
        if not self.answers:
            return "answers    none yet"
        speed = f"first token after {format_seconds(self.first_s / self.answers)}"
        if self.later_tokens:
            speed += f", then {format_seconds(self.later_s / self.later_tokens)} a token, on average"
        return (
            f"answers    {self.answers}, {_count(self.tokens, 'token')} in all, to prompts of {self.prompt_tokens}\n"
            f"speed      {speed}"
        )


def summary(reply: Reply, tokens_a_pass: float = 0.0) -> str:
    """The line below an answer: tokens and seconds, why it ended early, and `tokens_a_pass` unless it is 0."""
    count = len(reply.tokens)
    ended = {"stop": "", "length": ", the limit", "cancelled": ", stopped"}[reply.finish_reason]
    if not count:
        return f"no token{ended}"
    text = f"{_count(count, 'token')}{ended}, first after {format_seconds(reply.first_token_s)}"
    if count > 1:
        text += f", then {format_seconds(reply.token_s)} a token"
    return f"{text}, {tokens_a_pass:.1f} tokens a pass" if tokens_a_pass else text


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
