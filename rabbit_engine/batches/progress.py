"""How far a batch is, and what it did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """Lines `done` of `total`, of which `resumed` were in the output file at the start; `tokens` generated in `seconds` since.

    `running` answers are under way. Lines that `failed` are among those done.
    """

    total: int
    done: int = 0
    failed: int = 0
    resumed: int = 0
    running: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def lines_per_s(self) -> float:
        """Lines finished a second since the start; 0 before the first."""
        return (self.done - self.resumed) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated a second since the start, those of unfinished answers included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the end at the rate so far; None before the first line."""
        rate = self.lines_per_s
        return (self.total - self.done) / rate if rate else None

    def __str__(self) -> str:
        left = "" if self.remaining_s is None else f", {_duration(self.remaining_s)} left"
        failed = f", {self.failed} failed" if self.failed else ""
        rates = f"{self.lines_per_s:.2f} lines/s, {self.tokens_per_s:.1f} tokens/s"
        return f"{self.done} of {self.total} lines{failed}, {self.running} under way, {rates}{left}"


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What a batch did: of `lines` in the input, `resumed` were answered before, `failed` got an error in total."""

    lines: int
    failed: int
    resumed: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        resumed = f" ({self.resumed} lines were done before)" if self.resumed else ""
        answered = f"{self.lines - self.failed} of {self.lines} lines answered, {self.failed} failed{resumed}"
        return f"{answered}; {self.tokens} tokens in {_duration(self.seconds)}"


def _duration(seconds: float) -> str:
    """`3:02:07`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
