"""The logits processor: what cannot follow in an answer gets no probability."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, StoppingCriteria

from rabbit_engine.errors import ConfigurationError, ConstraintError
from rabbit_engine.sessions.constraints.library import worded

_FloatTensor = torch.FloatTensor
_LongTensor = torch.LongTensor


class ConstrainedTokens(LogitsProcessor):
    """Removes the tokens that cannot follow in an answer, in each row of one call of `generate`.

    The answer begins where the first call finds the end of the prompt. End tokens remain where the answer may end. Rows may
    change their order, as beams do, and go back to an earlier length, as guesses do that were wrong.
    """

    supports_continuous_batching = False

    def __init__(self, matcher: Any) -> None:
        self._fresh = matcher
        self._rows: list[_Row] = []
        self._prompts: torch.Tensor | None = None
        self._longest = 0

    def __call__(self, input_ids: _LongTensor, scores: _FloatTensor) -> _FloatTensor:
        """The scores [rows, vocabulary] of what may follow `input_ids` [rows, length]; the others become -inf.

        Raises ConstraintError where nothing can follow, ConfigurationError in another call of `generate`.
        """
        width = scores.shape[1]
        allowed = [row.allowed(answer) for row, answer in self._follow(input_ids)]
        if all(each is None for each in allowed):
            return scores
        if any(each is not None and not each[:width].any() for each in allowed):
            raise ConstraintError(
                "the answer is complete, but the model has no end token: pass stopping_criteria=[processor.completion]"
            )
        mask = torch.stack([_fitted(each, width) for each in allowed]).to(scores.device)
        found = scores.masked_fill(~mask, -torch.inf)
        stuck = torch.isneginf(found).all(dim=1, keepdim=True)
        return found.masked_fill(stuck & mask, 0.0)  # type: ignore[return-value] # other processors left nothing that is allowed

    @property
    def completion(self) -> StoppingCriteria:
        """A stopping criterion for the same call: ends a row where nothing but its end can follow, without a pass for that."""
        return Completion(self)

    def is_complete(self, input_ids: torch.Tensor) -> list[bool]:
        """Whether nothing but an end token can follow each row of `input_ids` [rows, length]."""
        return [row.is_complete(answer) for row, answer in self._follow(input_ids)]

    @property
    def begins(self) -> int:
        """The number of tokens before the answer; 0 before the first call."""
        return 0 if self._prompts is None else int(self._prompts.shape[1])

    def fresh_row(self) -> _Row:
        """A follower at the beginning of an answer."""
        return _Row(self._fresh.deep_copy())

    def _follow(self, input_ids: torch.Tensor) -> list[tuple[_Row, list[int]]]:
        """Each row with the tokens of its answer."""
        if self._prompts is None:
            self._prompts, self._longest = input_ids.clone(), input_ids.shape[1]
            self._rows = [self.fresh_row() for _ in range(input_ids.shape[0])]
        begins, length = self._prompts.shape[1], input_ids.shape[1]
        if not begins <= length <= self._longest + 1 or not torch.equal(input_ids[:, :begins], self._prompts):
            raise ConfigurationError("a constraint's logits processor follows one call of generate: make one for each")
        self._longest = max(self._longest, length)
        return list(zip(self._rows, input_ids[:, begins:].tolist(), strict=True))


class Completion(StoppingCriteria):
    """Ends each row that is complete. Beam search asks it about more rows than it has."""

    def __init__(self, tokens: ConstrainedTokens) -> None:
        self._tokens = tokens
        self._rows: list[_Row] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:  # noqa: ARG002
        """True [rows] for those that are complete."""
        answers = input_ids[:, self._tokens.begins :].tolist()
        self._rows += [self._tokens.fresh_row() for _ in range(len(answers) - len(self._rows))]
        complete = [row.is_complete(answer) for row, answer in zip(self._rows, answers, strict=False)]
        return torch.tensor(complete, device=input_ids.device)


class _Row:
    """Follows one text through the grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._tokens: list[int] = []
        """Those that the grammar took."""

    def allowed(self, answer: list[int]) -> torch.Tensor | None:
        """What may follow, bool [tokens]; None after an end, or after a guess that the grammar does not allow."""
        if not self._go_to(answer) or self._has_ended:
            return None
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise ConstraintError(f"the constraint cannot be followed any further: {worded(self._matcher.get_error())}")
        return torch.from_numpy(bits).bool()

    def is_complete(self, answer: list[int]) -> bool:
        """Whether nothing but an end can follow, or one came."""
        return self._go_to(answer) and bool(self._matcher.is_stopped())

    @property
    def _has_ended(self) -> bool:
        return bool(self._matcher.stop_reason() == "EndOfSentence")

    def _go_to(self, answer: list[int]) -> bool:
        """Take back or follow tokens up to this answer; False if the grammar does not allow it."""
        if self._tokens != answer[: len(self._tokens)]:
            shorter = min(len(self._tokens), len(answer))
            same = next((index for index in range(shorter) if self._tokens[index] != answer[index]), shorter)
            self._matcher.rollback(len(self._tokens) - same)
            del self._tokens[same:]
        new = answer[len(self._tokens) :]
        taken = self._matcher.try_consume_tokens(new) if new else 0
        self._tokens += new[:taken]
        return bool(taken == len(new))


def _fitted(allowed: torch.Tensor | None, width: int) -> torch.Tensor:
    """bool [width]; all of it without a limit."""
    if allowed is None:
        return torch.ones(width, dtype=torch.bool)
    found = torch.zeros(width, dtype=torch.bool)
    count = min(width, len(allowed))
    found[:count] = allowed[:count]
    return found
