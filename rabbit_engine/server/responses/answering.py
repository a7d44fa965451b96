"""Answers as OpenAI's Responses API gives them: events of a stream, or the response that the last one holds."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from rabbit_engine.server.errors import told_error
from rabbit_engine.server.flow import AnswerFlow, AnswerForm, form_of
from rabbit_engine.server.openai.constraints import forced_call
from rabbit_engine.server.openai.fields import unsupported
from rabbit_engine.server.openai.wire import Wire
from rabbit_engine.server.responses.output import Event, Output
from rabbit_engine.server.responses.schema import ResponseRequest
from rabbit_engine.server.service import Taken
from rabbit_engine.server.streams import Silence
from rabbit_engine.sessions import Events, Piece, Reply, Request, Session

Response = Taken[ResponseRequest, Request]


def prepared(session: Session, asked: ResponseRequest) -> Request:
    """The session's request. Raises RequestError, or what the session raises."""
    asked.refuse_unsupported()
    if asked.truncation == "auto" and not session.truncates:
        raise unsupported("truncation", "start the server with --overflow truncate")
    if asked.effort is not None and not session.template_reads("reasoning_effort"):
        raise unsupported("reasoning.effort", "the checkpoint's chat template does not read it")
    template = {"tools": asked.offered_tools, "reasoning_effort": asked.effort}
    given = {**asked.template_kwargs(), **{name: value for name, value in template.items() if value}}
    tools, parallel = asked.offered_tools, asked.parallel_tool_calls is not False
    forced = forced_call(session, asked.tool_choice, tools, asked.form, parallel=parallel)
    with forced.errors():
        messages = asked.conversation_messages(with_images=session.takes_images)
        return session.request(messages, **given, **asked.options(), **forced.options)


class Answering:
    """One answer: `begin`, `take` for each event of the session, and `fail` or the end of `take` return the client's events."""

    def __init__(self, session: Session, model: str, asked: ResponseRequest, request: Request) -> None:
        self._asked, self._model = asked, model
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._flow = AnswerFlow(_form(session, asked, request))
        self._output = Output(Wire("response", model, session.model.tokenizer), with_logprobs=asked.alternatives is not None)
        self.reply: Reply | None = None

    def begin(self) -> Iterator[Event]:
        """The first events."""
        yield {"type": "response.created", "response": self.body("in_progress")}
        yield {"type": "response.in_progress", "response": self.body("in_progress")}

    def take(self, event: Piece | Reply) -> Iterator[Event]:
        """The events of what the session generated."""
        for delta in self._flow.end() if isinstance(event, Reply) else self._flow.push(event):
            yield from self._output.add(delta)
        if isinstance(event, Reply):
            self.reply = event
            yield from self._output.end(complete=event.finish_reason == "stop")
            status = self._status(event)
            yield {"type": f"response.{status}", "response": self.body(status)}

    def fail(self, error: BaseException) -> Event:
        """The last event of a stream that failed."""
        failure = {"code": "server_error", "message": str(told_error(error))}
        return {"type": "response.failed", "response": {**self.body("failed"), "error": failure}}

    def whole(self) -> dict[str, Any]:
        """The finished response."""
        assert self.reply is not None  # noqa: S101 - called after the last event
        return self.body(self._status(self.reply))

    def _status(self, reply: Reply) -> str:
        return "completed" if reply.finish_reason == "stop" else "incomplete"

    def body(self, status: str) -> dict[str, Any]:
        """The response as it is now."""
        asked = self._asked
        ended = self.reply is not None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._model,
            "output": list(self._output.items),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": asked.effort, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": asked.told_format},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.told_tools,
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": self._usage() if ended else None,
            "metadata": asked.metadata or {},
        }

    def _usage(self) -> dict[str, Any]:
        assert self.reply is not None  # noqa: S101 - called for an answer that ended
        prompt, answer = self.reply.prompt_tokens, len(self.reply.tokens)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self.reply.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": self._flow.reasoning_tokens},
            "total_tokens": prompt + answer,
        }


async def stream(taken: Response, events: Events) -> AsyncIterator[str]:
    """An answer as it is generated; an error is the last event."""
    answering = _answering(taken)
    number = 0

    def told(found: Iterator[Event]) -> Iterator[str]:
        nonlocal number
        for event in found:
            yield numbered(event, number)
            number += 1

    for chunk in told(answering.begin()):
        yield chunk
    try:
        async for heard in taken.follow(events):
            if isinstance(heard, Silence):
                yield heard.comment()
                continue
            for chunk in told(answering.take(heard[1])):
                yield chunk
    except Exception as error:  # noqa: BLE001 - the status has been sent
        for chunk in told(iter([answering.fail(error)])):
            yield chunk


def numbered(event: Event, number: int) -> str:
    """A server-sent event with its place in the stream."""
    body = {"type": event["type"], "sequence_number": number, **event}
    return f"event: {event['type']}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"


async def whole(taken: Response, events: Events) -> dict[str, Any]:
    """A whole answer: what the last event of its stream would hold."""
    answering = _answering(taken)
    async for heard in taken.follow(events):
        if not isinstance(heard, Silence):
            for _ in answering.take(heard[1]):
                continue
    return answering.whole()


def _answering(taken: Response) -> Answering:
    return Answering(taken.served.session, taken.served.name, taken.asked, taken.prepared)


def _form(session: Session, asked: ResponseRequest, request: Request) -> AnswerForm:
    names = [tool["function"]["name"] for tool in asked.offered_tools]
    return form_of(session, request, names, asked.most_calls)
