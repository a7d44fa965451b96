"""Runs a forward for each of many texts, as many in a pass over the weights as the memory holds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic, NoReturn, Protocol, TypeVar

import torch
from torch import nn

from rabbit_engine.errors import PromptTooLongError, TokenizerNotFoundError
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.planning.demand import Demand
from rabbit_engine.sessions.engine import Job
from rabbit_engine.sessions.futures import Promise, computing_job
from rabbit_engine.sessions.inputs import Fit, InputEncoder
from rabbit_engine.sessions.room import Room
from rabbit_engine.tasks.batches import Batch, Inputs, can_pad, collate, group, logits_rows
from rabbit_engine.transformers_bridge.forwards import last_logits_argument, no_cache_argument

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

    @property
    def is_full(self) -> bool:
        """Whether one more job would be rejected."""

    def refuse(self) -> NoReturn:
        """Raise QueueFullError."""


class Started(Generic[T]):
    """Forwards in the queue: the results of their texts, in the order of the texts.

    The first failure is raised, and those that have not begun are dropped.
    """

    def __init__(self, groups: Sequence[Sequence[int]], futures: Sequence[Future[list[T]]]) -> None:
        self._groups, self._futures = groups, futures

    def results(self) -> list[T]:
        """Wait for them."""
        found: dict[int, T] = {}
        try:
            for indices, future in zip(self._groups, self._futures, strict=True):
                found.update(zip(indices, future.result(), strict=True))
        finally:
            for future in self._futures:
                future.cancel()
        return [found[index] for index in range(len(found))]

    def when_ended(self, tell: Callable[[], object]) -> None:
        """Call `tell` once, from any thread, when all have ended, so that `results` waits no more."""
        left, lock = [len(self._futures)], threading.Lock()

        def ended(_: object) -> None:
            with lock:
                left[0] -= 1
                is_last = left[0] == 0
            if is_last:
                tell()

        for future in self._futures:
            future.add_done_callback(ended)
        if not self._futures:
            tell()

    def cancel(self) -> None:
        """Drop those that have not begun."""
        for future in self._futures:
            future.cancel()

    async def awaited(self) -> list[T]:
        """Await them. Cancelling the task drops those that have not begun."""
        try:
            for future in self._futures:
                await asyncio.wrap_future(future)
        finally:
            for future in self._futures:
                future.cancel()
        return self.results()


class Forwards:
    """Forwards of a session's model, in step with its answers.

    Each text has a forward of its own, and all of a pass share its weights: exact, bit for bit. Unless `exact`, texts of about
    the same length share a forward as a padded batch: fewer, larger products, and results that differ by rounding.
    """

    def __init__(self, model: SessionModel, room: Room, queue: Queue, vocabulary: int, *, exact: bool) -> None:
        self._model, self._room, self._queue, self._exact = model, room, queue, exact
        self.encoder = InputEncoder(model, vocabulary)

    def fit(self, *, most: int | None = None, logits: int = 0, truncation: bool = False, stride: int | None = None) -> Fit:
        """How a text fits that may have `most` tokens and needs `logits` rows over the vocabulary, within the model's
        positions, its tokenizer's limit and the memory."""
        limits = [limit for limit in (most, self._tokenizer_limit(), _position_limit(self._model)) if limit is not None]
        fits = self._room.most_tokens_of(lambda tokens: Demand(tokens, 0, logits=logits), min(limits, default=None))
        return Fit(fits, truncation, stride)

    def run(
        self,
        texts: Sequence[Inputs],
        compute: Compute[T],
        *,
        exact: bool | None = None,
    ) -> list[T]:
        """The result of each text, in their order. Raises as `Started`."""
        self._queue.require_other_thread()
        return self.start(texts, compute, exact=exact).results()

    def start(
        self, texts: Sequence[Inputs], compute: Compute[T], *, exact: bool | None = None, bounded: bool = False
    ) -> Started[T]:
        """Queue the texts without waiting for them. Raises QueueFullError if `bounded` and the queue is already full."""
        self._queue.require_process()
        if bounded and self._queue.is_full:
            self._queue.refuse()
        exact = self._exact if exact is None else exact

        joins = not exact and can_pad(self._model.config)
        groups = group(texts, (lambda some: self._room.fits([_demand(some)])) if joins else None)
        futures: list[Future[list[T]]] = [Promise(self._queue) for _ in groups]
        jobs = []
        for indices, future in zip(groups, futures, strict=True):
            some = [texts[index] for index in indices]
            jobs.append(computing_job(self._work(some, compute), _demand(some), future, exact=exact))
        self._queue.submit(jobs, bounded=False)
        return Started(groups, futures)

    def require_room(self, text: Inputs) -> None:
        """Raise PromptTooLongError if the logits of a text need more memory than there is."""
        if not self._room.fits([_demand([text])]):
            raise PromptTooLongError(
                f"logits of {text.logits} tokens do not fit in the free memory: shorten the text, or load the model with a "
                "larger max_seq_len, which leaves less memory to the weights"
            )

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


def _demand(texts: Sequence[Inputs]) -> Demand:
    longest = max(map(len, texts))
    padded = min(map(len, texts)) < longest
    return Demand(longest, 0, sequences=len(texts), padded=padded, logits=logits_rows(texts))


def _position_limit(model: SessionModel) -> int | None:
    """The positions of a table that begins after its padding, as RoBERTa's does; None if there is none."""
    found = [getattr(module, "position_embeddings", None) for module in model.modules()]
    tables = [table for table in found if isinstance(table, nn.Embedding)]
    return min((table.num_embeddings - table.padding_idx - 1 for table in tables if table.padding_idx is not None), default=None)


def last_logits_of(model: SessionModel) -> Compute[torch.Tensor]:
    """Computes the logits of the positions that a text needs: [its `logits`, vocabulary], in the model's dtype."""

    def compute(batch: Batch) -> Iterable[torch.Tensor]:
        given = {**no_cache_argument(model.forward), **last_logits_argument(model.forward, batch.logits)}
        return batch.rows(model(**batch.arguments(model.forward), **given).logits)

    return compute


def logits_of(model: SessionModel) -> Compute[torch.Tensor]:
    """Computes the logits of a model's head, float32 on the CPU, [...] for each text."""

    def compute(batch: Batch) -> Iterable[torch.Tensor]:
        output = model(**batch.arguments(model.forward), **no_cache_argument(model.forward))
        return output.logits.float().cpu()  # type: ignore[no-any-return]

    return compute
