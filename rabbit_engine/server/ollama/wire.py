"""Formats answers as Ollama does: objects, and lines of objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter_ns
from typing import Any, Literal

from rabbit_engine.server.calls import CallArguments, CallStart
from rabbit_engine.server.flow import Answer, Delta, MadeCall, Reasoning
from rabbit_engine.server.streams import Silence
from rabbit_engine.sessions import Reply, TokenLogprob

NDJSON = "application/x-ndjson"

_LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


@dataclass(slots=True)
class Stopwatch:
    """When a request came, when it was read, and when its model was loaded; nanoseconds."""

    began_ns: int = field(default_factory=perf_counter_ns)
    read_ns: int = 0
    loaded_ns: int = 0

    def read(self) -> None:
        """It was read."""
        self.read_ns = self.loaded_ns = perf_counter_ns()

    def load(self) -> None:
        """Its model is loaded."""
        self.loaded_ns = perf_counter_ns()

    def durations(self) -> dict[str, int]:
        """Up to now."""
        return {"total_duration": perf_counter_ns() - self.began_ns, "load_duration": self.loaded_ns - self.read_ns}


def timestamp(moment: datetime | None = None) -> str:
    """A time in UTC, as Ollama writes it."""
    return (moment or datetime.now(UTC)).isoformat().replace("+00:00", "Z")


def line(body: Mapping[str, object]) -> str:
    """A line of a stream. All but ASCII is escaped: clients also split lines at other separators than a newline."""
    return json.dumps(body) + "\n"


class OllamaWire:
    """Objects of one request to `/api/chat` or `/api/generate`; `model` is its name as the client wrote it."""

    def __init__(self, kind: Literal["chat", "generate"], model: str, watch: Stopwatch, decode: Callable[[int], str]) -> None:
        self._kind, self._model, self._watch, self._decode = kind, model, watch, decode

    def part(
        self,
        text: str = "",
        *,
        reasoning: str = "",
        calls: Sequence[MadeCall] = (),
        logprobs: Sequence[TokenLogprob] = (),
    ) -> dict[str, object]:
        """A part of an answer."""
        more: dict[str, object] = {"thinking": reasoning} if reasoning else {}
        if calls:
            more["tool_calls"] = [_call(index, call) for index, call in enumerate(calls)]
        told = {"message": {"role": "assistant", "content": text, **more}} if self._kind == "chat" else {"response": text, **more}
        found = {"logprobs": [self._logprob(one) for one in logprobs]} if logprobs else {}
        return {"model": self._model, "created_at": timestamp(), **told, **found, "done": False}

    def silence(self, silence: Silence) -> dict[str, object]:
        """An empty part, which shows that the stream lives, and the place of the pass."""
        return {**self.part(), **({} if silence.facts is None else {"x_progress": silence.facts})}

    def parts(self, deltas: Iterable[Delta], calls: CallGatherer) -> Iterator[dict[str, object]]:
        """The parts of a stream: calls are given out when they are whole."""
        for delta in deltas:
            if not isinstance(delta, CallArguments):
                yield from self._called(calls)
            match delta:
                case CallStart() | CallArguments():
                    calls.add(delta)
                case Reasoning(text):
                    yield self.part(reasoning=text)
                case _ if delta.text or delta.logprobs:
                    yield self.part(delta.text, logprobs=delta.logprobs)

    def rest(self, calls: CallGatherer) -> Iterator[dict[str, object]]:
        """The call that ends the answer."""
        return self._called(calls)

    def _called(self, calls: CallGatherer) -> Iterator[dict[str, object]]:
        for call in calls.take():
            yield self.part(calls=[call]) if is_whole(call) else self.part(as_text(call))

    def last(self, part: Mapping[str, object], reply: Reply, context: Sequence[int] | None = None) -> dict[str, object]:
        """The end of an answer: the part with the reason and the statistics."""
        return {
            **part,
            "done": True,
            "done_reason": "length" if reply.finish_reason == "length" else "stop",
            **({} if context is None else {"context": list(context)}),
            **self._watch.durations(),
            "prompt_eval_count": reply.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(reply.first_token_s - reply.queued_s),
            "eval_count": len(reply.tokens),
            "eval_duration": _nanoseconds(reply.seconds - reply.first_token_s),
        }

    def whole(self, answer: Answer, reply: Reply, context: Sequence[int] | None = None) -> dict[str, object]:
        """A whole answer."""
        calls = [call for call in answer.calls if is_whole(call)]
        text = answer.text + "".join(as_text(call) for call in answer.calls if call not in calls)
        part = self.part(text, reasoning=answer.reasoning, calls=calls, logprobs=reply.logprobs or ())
        return self.last(part, reply, context)

    def emptied(self, reason: Literal["load", "unload"]) -> dict[str, object]:
        """The answer to a request that only loads or unloads the model."""
        return {**self.part(), "done": True, "done_reason": reason, **self._watch.durations()}

    def _logprob(self, found: TokenLogprob) -> dict[str, object]:
        top = [self._spelled(token, logprob) for token, logprob in found.top]
        return {**self._spelled(found.token, found.logprob), **({"top_logprobs": top} if top else {})}

    def _spelled(self, token: int, logprob: float) -> dict[str, object]:
        text = self._decode(token)
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(text.encode())}


class CallGatherer:
    """Joins the parts of a call."""

    def __init__(self) -> None:
        self._answer = Answer()

    def add(self, delta: CallStart | CallArguments) -> None:
        """Add the beginning of a call, or the next part of its arguments."""
        self._answer.add(CallArguments(len(self._answer.calls) - 1, delta.text) if isinstance(delta, CallArguments) else delta)

    def take(self) -> list[MadeCall]:
        """The calls so far, which are then forgotten."""
        found, self._answer.calls = self._answer.calls, []
        return found


def is_whole(call: MadeCall) -> bool:
    """Whether the arguments are an object, as Ollama's clients need them: an answer may end within a call."""
    return _arguments(call) is not None


def as_text(call: MadeCall) -> str:
    """A call that is not whole, as the model wrote it."""
    return f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}'


def _call(index: int, call: MadeCall) -> dict[str, object]:
    return {"id": call.id, "function": {"index": index, "name": call.name, "arguments": _arguments(call)}}


def _arguments(call: MadeCall) -> dict[str, Any] | None:
    try:
        found = json.loads(call.arguments or "{}", parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
