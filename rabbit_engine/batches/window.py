"""Answers lines with a session: as many at once as it takes, and a few more that wait, so that memory stays the same."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from rabbit_engine.batches.inputs import InputLine, name_of
from rabbit_engine.batches.lines import LineRequest, Task, custom_id_of, read_line, read_request
from rabbit_engine.batches.tasks import COMPUTED
from rabbit_engine.errors import MissingExtraError, ModelClosedError, SessionClosedError
from rabbit_engine.server.errors import RequestError, told_error
from rabbit_engine.server.openai.bodies import Bodies
from rabbit_engine.server.openai.schema import ChatRequest, CompletionRequest, parse
from rabbit_engine.sessions import Piece, Reply, Request, Session

ENDS_BATCH = (ModelClosedError, SessionClosedError, MissingExtraError, MemoryError, torch.OutOfMemoryError, OSError)
"""Errors that every other line would meet too: closed, out of memory, weights that cannot be read."""

Body = dict[str, object]


@dataclass(frozen=True, slots=True)
class Answered:
    """A line with its answer, or with the error that it got."""

    line: InputLine
    custom_id: str
    body: Body
    failure: RequestError | None = None

    @property
    def response(self) -> Body:
        """The response in OpenAI's form."""
        status = 200 if self.failure is None else self.failure.status
        return {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": self.body}

    @property
    def error(self) -> Body | None:
        """The error in OpenAI's form; None for an answer."""
        failure = self.failure
        return None if failure is None else {"code": failure.code or failure.kind, "message": str(failure)}


@dataclass(slots=True, eq=False)
class _Pending:
    """A line under way: `results` by index until there are `texts`, from which `body` makes the answer."""

    line: InputLine
    custom_id: str
    texts: int
    body: Callable[[list[Any]], Body]
    cancel: Callable[[], object] = lambda: None
    results: dict[int, object] = field(default_factory=dict)


class Window:
    """Lines under way. `most_texts` bounds the texts in them, however many lines the input has."""

    def __init__(self, session: Session, bodies: Bodies, task: Task | None, model: str, most_texts: int) -> None:
        self._session, self._bodies, self._task, self._model, self._most = session, bodies, task, model, most_texts
        self._inbox: queue.SimpleQueue[tuple[int, int, object]] = queue.SimpleQueue()
        self._pending: dict[int, _Pending] = {}
        self._starts: dict[Task, Callable[[InputLine, str, dict[str, Any]], _Pending]] = {
            "chat": self._chat,
            "complete": self._complete,
            **{task: partial(self._compute, task) for task in COMPUTED},
        }
        self.texts = self.tokens = 0

    def submit(self, line: InputLine) -> Answered | None:
        """Begin a line; the answer at once if it is refused."""
        try:
            found = read_line(line.raw)
            custom_id = custom_id_of(found, line.number)
            asked = read_request(found, self._task)
            pending = self._starts[asked.task](line, custom_id, self._with_model(asked))
        except ENDS_BATCH:
            raise
        except Exception as error:  # noqa: BLE001 - the line fails, the others go on
            return _failed(line, name_of(line), error)
        self._pending[line.number] = pending
        self.texts += pending.texts
        return None

    @property
    def is_full(self) -> bool:
        """Whether the next line must wait."""
        return self.texts >= self._most

    def finished(self, timeout_s: float) -> Iterator[Answered]:
        """Lines that are finished: all that are now, or else the next within `timeout_s`."""
        with suppress(queue.Empty):
            yield from self._take(*self._inbox.get(timeout=timeout_s))
            while True:
                yield from self._take(*self._inbox.get_nowait())

    def cancel(self) -> None:
        """End everything under way."""
        for pending in self._pending.values():
            pending.cancel()

    def __len__(self) -> int:
        return len(self._pending)

    def _take(self, number: int, index: int, event: object) -> Iterator[Answered]:
        if (pending := self._pending.get(number)) is None:  # it failed before
            return
        if isinstance(event, ENDS_BATCH):
            raise event
        if isinstance(event, BaseException):
            self._end(pending)
            yield _failed(pending.line, pending.custom_id, event)
            return
        pending.results[index] = event
        if len(pending.results) == pending.texts:
            self._end(pending)
            yield self._finish(pending)

    def _end(self, pending: _Pending) -> None:
        pending.cancel()
        del self._pending[pending.line.number]
        self.texts -= pending.texts

    def _finish(self, pending: _Pending) -> Answered:
        try:
            body = pending.body([pending.results[index] for index in range(pending.texts)])
        except ENDS_BATCH:
            raise
        except Exception as error:  # noqa: BLE001 - the line fails, the others go on
            return _failed(pending.line, pending.custom_id, error)
        return Answered(pending.line, pending.custom_id, body)

    def _with_model(self, asked: LineRequest) -> dict[str, Any]:
        """The body under the name of the only model: a file made for another server names that one's."""
        return {**asked.body, "model": self._model}

    def _chat(self, line: InputLine, custom_id: str, body: Mapping[str, Any]) -> _Pending:
        asked = parse(ChatRequest, dict(body))
        requests = self._bodies.chat_requests(asked)
        return self._ask(requests, _Pending(line, custom_id, len(requests), partial(self._bodies.chat, asked, requests)))

    def _complete(self, line: InputLine, custom_id: str, body: Mapping[str, Any]) -> _Pending:
        asked = parse(CompletionRequest, dict(body))
        if asked.prompt_alternatives is not None or asked.max_tokens == 0:
            raise RequestError(400, "a batch scores prompts with /v1/score", param="logprobs")
        requests = self._bodies.text_requests(asked)
        return self._ask(requests, _Pending(line, custom_id, len(requests), partial(self._bodies.text, asked, requests)))

    def _compute(self, task: Task, line: InputLine, custom_id: str, body: dict[str, Any]) -> _Pending:
        answer = COMPUTED[task](self._session, body)
        started = answer.start(partial(self._inbox.put, (line.number, 0, None)))
        return _Pending(line, custom_id, 1, lambda _: answer.ended(started), started.cancel)

    def _ask(self, requests: Sequence[Request], pending: _Pending) -> _Pending:
        tickets = self._session.ask(requests, partial(self._tell, pending.line.number), bounded=False)
        pending.cancel = partial(_cancel, tickets)
        return pending

    def _tell(self, number: int, index: int, event: Piece | Reply | BaseException) -> None:
        """Called with the line's number: what the session keeps of a request must not keep the line."""
        if isinstance(event, Piece):
            self.tokens += event.token is not None
        else:
            self._inbox.put((number, index, event))


def _cancel(works: Sequence[Any]) -> None:
    for work in works:
        work.cancel()


def _failed(line: InputLine, custom_id: str, error: BaseException) -> Answered:
    failure = told_error(error)
    return Answered(line, custom_id, failure.body(), failure)
