"""Texts to embed: encoded first, then computed in the session's thread, then made into vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.sessions.forwards import Forwards, Started
from rabbit_engine.tasks.batches import Batch, Inputs
from rabbit_engine.tasks.embedding import Embedder, embedding_base, hidden_states


class EmbeddingWork:
    """Encoded texts, each as its windows. `run` waits for the vectors; a caller that must not wait uses `start` and `vectors`."""

    def __init__(self, model: SessionModel, forwards: Forwards, embedder: Embedder, windows: Sequence[Sequence[Inputs]]) -> None:
        self._forwards, self._embedder, self._windows = forwards, embedder, windows
        self._base = embedding_base(model)

    @property
    def tokens(self) -> int:
        """The tokens of all texts, with their prompts."""
        return sum(len(window) for each in self._windows for window in each)

    def run(self, dimensions: int | None = None, *, exact: bool | None = None) -> torch.Tensor:
        """The vectors, float32 [texts, width] on the CPU. Raises as `Session.embed`."""
        return self.vectors(self.start(exact=exact).results(), dimensions)

    def start(self, *, exact: bool | None = None, bounded: bool = False) -> Started[torch.Tensor]:
        """Queue the windows. Raises QueueFullError if `bounded` and the queue is already full."""

        def compute(batch: Batch) -> Iterable[torch.Tensor]:
            return self._embedder.pool(hidden_states(self._base, batch), batch.pooled)

        return self._forwards.start([window for each in self._windows for window in each], compute, exact=exact, bounded=bounded)

    def vectors(self, pooled: Sequence[torch.Tensor], dimensions: int | None = None) -> torch.Tensor:
        """The vectors, from what the windows gave. Raises ConfigurationError for more `dimensions` than there are."""
        if not self._windows:
            return torch.empty(0, 0)
        return self._embedder.finish(torch.stack(_means(self._windows, pooled)), dimensions)


def _means(windows: Sequence[Sequence[Inputs]], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The mean of each text's vectors, weighted by the tokens of their windows."""
    found, rest = [], iter(vectors)
    for each in windows:
        own = torch.stack([next(rest) for _ in each])
        weights = torch.tensor([len(window) - window.skipped for window in each], dtype=own.dtype)
        found.append(own[0] if len(each) == 1 else (weights[:, None] * own).sum(dim=0) / weights.sum())
    return found
