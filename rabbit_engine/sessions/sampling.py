"""What transformers has no keyword for: penalties as OpenAI defines them, and log probabilities as tokens come."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

_FloatTensor = torch.FloatTensor
_LongTensor = torch.LongTensor


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of an answer, its log probability, and the likeliest at its place with theirs, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Penalties(LogitsProcessor):
    """`presence` taken once and `frequency` as often as a token is in the answer so far, from its logit."""

    supports_continuous_batching = False

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence, self._frequency = presence, frequency
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: _LongTensor, scores: _FloatTensor) -> _FloatTensor:
        """Logits [1, vocabulary] after the tokens [1, length]."""
        counts = Counter(input_ids[0, self._prompt_tokens :].tolist())
        if not counts:
            return scores
        tokens = torch.tensor(list(counts), device=scores.device)
        amounts = torch.tensor([self._presence + self._frequency * count for count in counts.values()], device=scores.device)
        scores = scores.clone()  # type: ignore[assignment]
        scores[0, tokens] -= amounts.to(scores.dtype)
        return scores


class LogprobRecorder(LogitsProcessor):
    """Remembers the log probabilities at the newest place: after penalties and biases, before temperature and the rest."""

    supports_continuous_batching = False

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._row: torch.Tensor | None = None

    def __call__(self, input_ids: _LongTensor, scores: _FloatTensor) -> _FloatTensor:  # noqa: ARG002
        """Logits [1, vocabulary], which it leaves as they are."""
        self._row = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def of(self, token: int) -> TokenLogprob:
        """Of the token that was chosen there."""
        assert self._row is not None  # noqa: S101 - a token is chosen from logits
        best = self._row.topk(self._alternatives) if self._alternatives else None
        top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenLogprob(token, float(self._row[token]), top)
