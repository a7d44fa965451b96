"""Logits processors that transformers lacks: OpenAI's penalties, and log probabilities as tokens are generated."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

_FloatTensor = torch.FloatTensor
_LongTensor = torch.LongTensor


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of an answer, its log probability, and the likeliest tokens at its position with theirs, in descending order."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Penalties(LogitsProcessor):
    """Subtracts `presence` once and `frequency` per occurrence from the logit of each token in the answer so far."""

    supports_continuous_batching = False

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency
        self._answer_begins: int | None = None  # after a prompt, or after the token that a decoder begins with

    def __call__(self, input_ids: _LongTensor, scores: _FloatTensor) -> _FloatTensor:
        """The penalised logits [1, vocabulary] for the tokens [1, length] so far."""
        if self._answer_begins is None:
            self._answer_begins = input_ids.shape[1]
        counts = Counter(input_ids[0, self._answer_begins :].tolist())
        if not counts:
            return scores
        tokens = torch.tensor(list(counts), device=scores.device)
        amounts = torch.tensor([self._presence + self._frequency * count for count in counts.values()], device=scores.device)
        scores = scores.clone()  # type: ignore[assignment]
        scores[0, tokens] -= amounts.to(scores.dtype)
        return scores


class LogprobRecorder(LogitsProcessor):
    """Records the log probabilities at the newest position: after penalties and biases, before temperature and the rest."""

    supports_continuous_batching = False

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._row: torch.Tensor | None = None

    def __call__(self, input_ids: _LongTensor, scores: _FloatTensor) -> _FloatTensor:  # noqa: ARG002
        """Logits [1, vocabulary], unchanged."""
        self._row = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def of(self, token: int) -> TokenLogprob:
        """The log probability of the token chosen there."""
        assert self._row is not None  # noqa: S101 - logits come before the token
        best = self._row.topk(self._alternatives) if self._alternatives else None
        top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenLogprob(token, float(self._row[token]), top)
