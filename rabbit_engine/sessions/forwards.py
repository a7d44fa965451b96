"""Runs a forward for each of many texts, as many in a pass over the weights as the memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

import torch
from torch import nn

from rabbit_engine.errors import TokenizerNotFoundError
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.planning.demand import Demand
from rabbit_engine.sessions.engine import Job
from rabbit_engine.sessions.futures import Promise, computing_job
from rabbit_engine.sessions.inputs import Fit, InputEncoder
from rabbit_engine.sessions.room import Room
from rabbit_engine.tasks.batches import Batch, Inputs, can_pad, collate, group
from rabbit_engine.transformers_bridge.forwards import no_cache_argument

T = TypeVar("T")
Compute = Callable[[Batch], Iterable[T]]
"""Runs a forward of the model over a batch, and returns a result for each of its texts."""


class Queue(Protocol):
    """The queue of a session's thread."""

    def require_process(self) -> None:
        """Raise ModelClosedError in a forked child."""

    def require_other_thread(self) -> None:
        """Raise ConfigurationError in the session's own thread."""

    def submit(self, jobs: Sequence[Job], *, bounded: bool = True) -> None:
        """Queue all jobs."""


class Forwards:
    """Forwards of a session's model, in step with its answers.

    Each text has a forward of its own, and all of a pass share its weights: exact, bit for bit. Unless `exact`, texts of about
    the same length share a forward as a padded batch: fewer, larger products, and results that differ by rounding.
    """

    def __init__(self, model: SessionModel, room: Room, queue: Queue, vocabulary: int, *, exact: bool) -> None:
        self._model, self._room, self._queue, self._exact = model, room, queue, exact
        self.encoder = InputEncoder(model, vocabulary)

    def fit(self, *, most: int | None = None, logits: int = 0, truncation: bool = False, stride: int | None = None) -> Fit:
        """How a text fits that may have `most` tokens, and needs `logits` rows over the vocabulary for each: the limits of
        its positions, its tokenizer and the memory are those of the model."""
        limits = [limit for limit in (most, self._tokenizer_limit(), _position_limit(self._model)) if limit is not None]
        fits = self._room.most_tokens_of(lambda tokens: Demand(tokens, 0, logits=logits * tokens), min(limits, default=None))
        return Fit(fits, truncation, stride)

    def run(
        self,
        texts: Sequence[Inputs],
        compute: Compute[T],
        *,
        logits: int = 0,
        exact: bool | None = None,
    ) -> list[T]:
        """The result of each text, in their order. For each token, a forward computes `logits` rows over the vocabulary.

        The first failure is raised, and those that have not begun are dropped.
        """
        self._queue.require_process()
        self._queue.require_other_thread()
        exact = self._exact if exact is None else exact

        def demand(count: int, longest: int, *, padded: bool) -> Demand:
            return Demand(longest, 0, sequences=count, padded=padded, logits=logits * longest)

        def fits(count: int, longest: int) -> bool:
            return self._room.fits([demand(count, longest, padded=True)])

        lengths = [len(text) for text in texts]
        groups = group(lengths, fits if not exact and can_pad(self._model.config) else None)
        futures: list[Future[list[T]]] = [Promise(self._queue) for _ in groups]
        jobs = []
        for indices, future in zip(groups, futures, strict=True):
            padded = lengths[indices[-1]] < lengths[indices[0]]
            work = self._work([texts[index] for index in indices], compute)
            jobs.append(computing_job(work, demand(len(indices), lengths[indices[0]], padded=padded), future, exact=exact))
        self._queue.submit(jobs, bounded=False)
        return list(_in_order(groups, futures))

    def _work(self, texts: Sequence[Inputs], compute: Compute[T]) -> Callable[[], list[T]]:
        padding = getattr(self._model.config.get_text_config(), "pad_token_id", None) or 0
        return lambda: list(compute(collate(texts, self._model.device, padding)))

    def _tokenizer_limit(self) -> int | None:
        try:
            most = getattr(self._model.tokenizer, "model_max_length", None)
        except TokenizerNotFoundError:  # the texts may be token ids
            return None
        return int(most) if most is not None and most < _NO_LIMIT else None


_NO_LIMIT = 10**9
"""Tokenizers without a limit have a number far beyond this one."""


def _in_order(groups: Sequence[Sequence[int]], futures: Sequence[Future[list[T]]]) -> Iterator[T]:
    found: dict[int, T] = {}
    try:
        for indices, future in zip(groups, futures, strict=True):
            found.update(zip(indices, future.result(), strict=True))
    finally:
        for future in futures:
            future.cancel()
    return (found[index] for index in range(len(found)))


def _position_limit(model: SessionModel) -> int | None:
    """The positions of a table that begins after its padding, as RoBERTa's does; None if there is none."""
    found = [getattr(module, "position_embeddings", None) for module in model.modules()]
    tables = [table for table in found if isinstance(table, nn.Embedding)]
    return min((table.num_embeddings - table.padding_idx - 1 for table in tables if table.padding_idx is not None), default=None)


def logits_of(model: SessionModel) -> Compute[torch.Tensor]:
    """Computes the logits of a model's head, float32 on the CPU, [...] for each text."""

    def compute(batch: Batch) -> Iterable[torch.Tensor]:
        output = model(**batch.arguments(model.forward), **no_cache_argument(model.forward))
        return output.logits.float().cpu()  # type: ignore[no-any-return]

    return compute
