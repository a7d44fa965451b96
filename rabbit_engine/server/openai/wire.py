"""Formats answers as OpenAI does."""

from __future__ import annotations

import base64
import json
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from rabbit_engine.model.protocols import Decoder
from rabbit_engine.server.calls import CallArguments, CallStart
from rabbit_engine.server.flow import Answer, Delta, MadeCall, Reasoning
from rabbit_engine.sessions import Reply, TokenLogprob

_REASONS = {"cancelled": "stop"}
LAST_CHUNK = "data: [DONE]\n\n"


class Wire:
    """Bodies and chunks of one request: `kind` is "chat.completion" or "text_completion"."""

    def __init__(self, kind: str, model: str, decoder: Decoder) -> None:
        self._kind, self._decoder = kind, decoder
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def body(self, choices: Sequence[Mapping[str, object]], replies: Sequence[Reply]) -> dict[str, object]:
        """A whole answer."""
        return {**self._head, "object": self._kind, "choices": list(choices), "usage": usage(replies)}

    def chunk(self, choice: Mapping[str, object] | None = None, counts: Mapping[str, object] | None = None) -> str:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self._kind == "chat.completion" else self._kind
        body = {**self._head, "object": kind, "choices": [] if choice is None else [choice]}
        return event({**body, "usage": counts} if counts is not None else body)

    def logprobs(self, pieces: Sequence[TokenLogprob]) -> dict[str, object]:
        """In the chat format: a list of tokens."""
        return {"content": [self._token(found) for found in pieces], "refusal": None}

    def _token(self, found: TokenLogprob) -> dict[str, object]:
        top = [self._spelled(token, logprob) for token, logprob in found.top]
        return {**self._spelled(found.token, found.logprob), "top_logprobs": top}

    def _spelled(self, token: int, logprob: float) -> dict[str, object]:
        text = self._text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    def legacy_logprobs(self, pieces: Sequence[TokenLogprob], offset: int = 0) -> dict[str, object]:
        """In the format of completions: parallel lists. `offset` is where the first token's text begins."""
        texts = [self._text(found.token) for found in pieces]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(found.logprob) for found in pieces],
            "top_logprobs": [self._by_text(found.top) for found in pieces],
            "text_offset": [*accumulate(map(len, texts), initial=offset)][: len(texts)],
        }

    def echoed_logprobs(self, prompt: Sequence[TokenLogprob], answer: Sequence[TokenLogprob], most: int) -> dict[str, object]:
        """The same for a prompt and its answer, with up to `most` alternatives. Nothing comes before the prompt's first token."""
        shown = [replace(found, top=found.top[:most]) for found in prompt]
        found: dict[str, Any] = self.legacy_logprobs([*shown, *answer])
        for name in ("token_logprobs", "top_logprobs"):
            found[name][:1] = [None] * len(found[name][:1])
        return found

    def prompt_logprobs(self, prompt: Sequence[TokenLogprob], ranks: Sequence[int], most: int) -> list[object]:
        """In vLLM's format: for each token but the first, those of the likeliest and its own, by token id."""
        return [None, *(self._ranked(found, rank, most) for found, rank in zip(prompt[1:], ranks, strict=True))]

    def _ranked(self, found: TokenLogprob, rank: int, most: int) -> dict[str, object]:
        ranked = [(token, place, value) for place, (token, value) in enumerate(found.top[:most], start=1)]
        own = (found.token, rank, found.logprob)
        return {
            str(token): {"logprob": _finite(value), "rank": place, "decoded_token": self._text(token)}
            for token, place, value in [*ranked, own]
        }

    def _by_text(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """By text: of tokens with the same text, such as parts of characters, the likeliest."""
        return {self._text(token): _finite(value) for token, value in reversed(top)}

    def _text(self, token: int) -> str:
        return str(self._decoder.decode([token]))


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)


def event(body: Mapping[str, object]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def usage(replies: Sequence[Reply]) -> dict[str, object]:
    """Token counts. A prompt with several answers counts once, and as computed if one of them computed it."""
    prompt = max((reply.prompt_tokens for reply in replies), default=0)
    cached = min((reply.cached_tokens for reply in replies), default=0)
    return _usage(prompt, sum(len(reply.tokens) for reply in replies), cached)


def usage_of_prompts(replies: Sequence[Reply], choices: int) -> dict[str, object]:
    """The same for several prompts, each answered `choices` times."""
    prompt, cached = (sum(getattr(reply, name) for reply in replies[::choices]) for name in ("prompt_tokens", "cached_tokens"))
    return _usage(prompt, sum(len(reply.tokens) for reply in replies), cached)


def _usage(prompt: int, answer: int, cached: int = 0) -> dict[str, object]:
    counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return counts | ({"prompt_tokens_details": {"cached_tokens": cached}} if cached else {})


def reason(reply: Reply) -> str:
    """Why the answer ended, as OpenAI names it."""
    return _REASONS.get(reply.finish_reason, reply.finish_reason)


def chat_choice(wire: Wire, index: int, reply: Reply, answer: Answer) -> dict[str, object]:
    """A choice of a whole chat answer."""
    text = answer.text if answer.text or not answer.calls else None
    message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [_tool_call(call) for call in answer.calls]
    return {
        "index": index,
        "message": message,
        "logprobs": None if reply.logprobs is None else wire.logprobs(reply.logprobs),
        "finish_reason": "tool_calls" if answer.calls else reason(reply),
    }


def _tool_call(call: MadeCall) -> dict[str, object]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_delta(
    wire: Wire, index: int, delta: Mapping[str, object], logprobs: Sequence[TokenLogprob] = (), ended: str | None = None
) -> str:
    """An event of a chat's stream."""
    found = wire.logprobs(logprobs) if logprobs else None
    return wire.chunk({"index": index, "delta": delta, "logprobs": found, "finish_reason": ended})


def chat_event(wire: Wire, index: int, delta: Delta) -> str:
    """The event of a part of an answer."""
    match delta:
        case Reasoning(text):
            return chat_delta(wire, index, {"reasoning_content": text})
        case CallStart(call, identity, name):
            function = {"name": name, "arguments": ""}
            begun = {"index": call, "id": identity, "type": "function", "function": function}
            return chat_delta(wire, index, {"tool_calls": [begun]})
        case CallArguments(call, text):
            return chat_delta(wire, index, {"tool_calls": [{"index": call, "function": {"arguments": text}}]})
        case _:
            return chat_delta(wire, index, {"content": delta.text}, delta.logprobs)


def embeddings(model: str, vectors: Sequence[Sequence[float]], encoding: str, tokens: int) -> dict[str, object]:
    """The answer to a request for embeddings of `tokens` in all."""
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(values, encoding)} for index, values in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": model, "usage": tokens_read(tokens)}


def tokens_read(tokens: int) -> dict[str, object]:
    """Token counts of what only reads."""
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _vector(values: Sequence[float], encoding: str) -> list[float] | str:
    """An embedding as numbers, or as base64 of little-endian float32."""
    return list(values) if encoding == "float" else base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
