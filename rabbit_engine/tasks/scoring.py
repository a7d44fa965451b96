"""Log-likelihoods of texts under a causal model, as lm-evaluation-harness computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.tasks.batches import Inputs

_ROWS = 128
"""Rows of logits in float32 at once: a vocabulary of 150,000 takes 73 MiB."""


@dataclass(frozen=True, slots=True)
class Score:
    """Natural logarithms of probabilities: of each scored token given all before it.

    `is_greedy` tells whether each of them was the likeliest. If asked for, `tops` are the likeliest tokens at each position with
    theirs, in descending order, and `ranks` the places of the scored tokens, 1 for the likeliest.
    """

    token_logprobs: tuple[float, ...]
    logprob: float
    is_greedy: bool
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()
    ranks: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """The number of scored tokens."""
        return len(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(-self.logprob / self.tokens)


def score_tokens(logits: torch.Tensor, targets: Sequence[int], alternatives: int | None = None) -> Score:
    """The score of `targets`, given the logits [targets, vocabulary] at the positions before them; computed in float32.

    With `alternatives`, also so many of the likeliest tokens at each position, and the ranks.
    """
    wanted = torch.tensor(targets, device=logits.device)
    found, ranks, tops = [], [], []
    for rows, tokens in zip(logits.split(_ROWS), wanted.split(_ROWS), strict=True):
        all_logprobs = rows.float().log_softmax(dim=-1)
        own = all_logprobs.gather(-1, tokens[:, None])
        found.append(own.squeeze(-1).cpu())
        if alternatives is not None:
            ranks += (1 + (all_logprobs > own).sum(dim=-1)).tolist()
            best = all_logprobs.topk(alternatives)
            tops += [tuple(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    logprobs = torch.cat(found)
    greedy = bool((logits.argmax(dim=-1) == wanted).all())
    return Score(tuple(logprobs.tolist()), float(logprobs.sum()), greedy, tuple(tops), tuple(ranks))


def continuation_inputs(context: Sequence[int], continuation: Sequence[int], most: int) -> Inputs:
    """A forward that scores a continuation: of its last `most` tokens but the very last, which nothing follows."""
    if not context or not continuation:
        raise ConfigurationError("there is nothing to score: a token is scored given those before it")
    ids = [*context, *continuation][-(most + 1) :]
    targets = tuple(continuation[-(len(ids) - 1) :])
    return Inputs({"input_ids": ids[:-1]}, logits=len(targets), targets=targets)


def split_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Move spaces at the end of a context to the continuation, whose first token usually contains one."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
