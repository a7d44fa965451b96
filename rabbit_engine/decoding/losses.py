"""Bounds what wrong expectations may cost: the time that decoding may take longer than without guesses."""

from __future__ import annotations

TRIAL_SHARE = 0.01
"""Of the time, what may be lost to trials, and again to trees that gain less than expected."""

_MOST_TRIALS = 1.0
"""In plain passes: more is not saved up."""

_MOST_FAILURES = 4
"""Passes with trees like the last one that may fail in a row, if as much was gained before."""

_FIRST_CREDIT = 0.25
"""In plain passes: what a model in memory may lose before it gained anything; there a guess that fails costs time at once."""

_MOST_OWED = 0.25
"""In plain passes: a greater loss is forgotten."""


class Losses:
    """Counts in plain passes: what trials may still cost, and what trees gained over plain decoding lately.

    Trials are trees of a size that was not measured, and guesses of a kind that failed lately: they may only be lost on purpose.
    The balance also has what is lost by error.
    """

    def __init__(self, *, rows_are_free: bool = True) -> None:
        """`rows_are_free`: passes wait for weights, as the plan says, so that guesses cost next to nothing."""
        self._for_trials = _MOST_TRIALS if rows_are_free else _FIRST_CREDIT
        self._balance = 1.0 if rows_are_free else _FIRST_CREDIT

    @property
    def are_high(self) -> bool:
        """Whether trees lost so much lately that texts should be decoded plainly for some time."""
        return self._balance <= 0

    def pass_time(self, passes: float) -> None:
        """Time went by."""
        self._for_trials = min(_MOST_TRIALS, self._for_trials + TRIAL_SHARE * passes)
        self._balance += TRIAL_SHARE * passes

    def may_spend(self, passes: float) -> bool:
        """Whether a trial may cost that much; it is then counted."""
        if passes > self._for_trials:
            return False
        self._for_trials -= max(0.0, passes)
        return True

    def settle(self, taken: float, tokens: int) -> None:
        """A pass and its draft took as long as `taken` plain passes, and gave that many tokens."""
        self._balance = max(min(self._balance + tokens - taken, _MOST_FAILURES * taken), -_MOST_OWED)
