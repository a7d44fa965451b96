"""Vectors of texts from the states of their windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.sessions.forwards import Forwards
from rabbit_engine.sessions.works import Work
from rabbit_engine.tasks.batches import Batch, Inputs
from rabbit_engine.tasks.embedding import Embedder, embedding_base, hidden_states

EmbeddingWork = Work[torch.Tensor, torch.Tensor]
"""Gives float32 [texts, width] on the CPU. Raises ConfigurationError for more dimensions than there are."""


def embedding_work(
    model: SessionModel,
    forwards: Forwards,
    embedder: Embedder,
    windows: Sequence[Sequence[Inputs]],
    dimensions: int | None = None,
) -> EmbeddingWork:
    """Embed texts, each encoded as its windows."""
    base = embedding_base(model)

    def compute(batch: Batch) -> Iterable[torch.Tensor]:
        return embedder.pool(hidden_states(base, batch), batch.pooled)

    def finish(pooled: list[torch.Tensor]) -> torch.Tensor:
        return embedder.finish(torch.stack(_means(windows, pooled)), dimensions) if windows else torch.empty(0, 0)

    return Work(forwards, [window for each in windows for window in each], compute, finish)


def _means(windows: Sequence[Sequence[Inputs]], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The mean of each text's vectors, weighted by the tokens of their windows."""
    found, rest = [], iter(vectors)
    for each in windows:
        own = torch.stack([next(rest) for _ in each])
        weights = torch.tensor([len(window) - window.skipped for window in each], dtype=own.dtype)
        found.append(own[0] if len(each) == 1 else (weights[:, None] * own).sum(dim=0) / weights.sum())
    return found
