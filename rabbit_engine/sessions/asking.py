"""The methods that most callers use: they encode prompts, wait for replies, and pass on pieces."""

from __future__ import annotations

import asyncio
import queue
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.sessions.answer import Piece, Reply
from rabbit_engine.sessions.prompts import Message
from rabbit_engine.sessions.underway import Event, Events, Request, Tell, Ticket, cancel_all

Chat = str | Message | Sequence[object]
"""A user's message, or messages as `{"role": "user", "content": "..."}` and in the other forms of `read_messages`."""


class AnswerMethods(ABC):
    """Answers to conversations, and continuations of texts."""

    def chat(self, messages: Chat, /, **options: object) -> Reply:
        """Answer a conversation, or a user's message.

        `options` are those of `Options` (`max_new_tokens`, `temperature`, `stop` ...), and variables of the chat template,
        such as `tools`. Raises PromptTooLongError, QueueFullError, ConfigurationError, or what the model raises.
        """
        return self._wait_for([self.request(messages, **options)])[0]

    def stream(self, messages: Chat, /, **options: object) -> Generator[str, None, Reply]:
        """As `chat`, piece by piece. Leaving the loop cancels the request. The generator's return value is the Reply."""
        return self._pieces(self.request(messages, **options))

    def generate(self, prompts: str | Sequence[str | Sequence[int]], **options: object) -> list[Reply]:
        """Continue many texts (or lists of token ids) at once: each pass serves all, and the replies are in the prompts' order.

        If there are more than `max_requests`, the rest wait; `max_queue` does not apply.
        """
        return self.answers(self._requests(prompts, options))

    async def achat(self, messages: Chat, /, **options: object) -> Reply:
        """`chat`, awaited. Cancelling the task cancels the request."""
        request = await asyncio.to_thread(self.request, messages, **options)
        async with aclosing(self.events([request])) as events:
            replies = [event async for _, event in events if isinstance(event, Reply)]
        return replies[0]

    async def astream(self, messages: Chat, /, **options: object) -> AsyncIterator[str]:
        """`stream`, awaited."""
        request = await asyncio.to_thread(self.request, messages, **options)
        async with aclosing(self.events([request])) as events:
            async for _, event in events:
                if isinstance(event, Piece) and event.text:
                    yield event.text

    async def agenerate(self, prompts: str | Sequence[str | Sequence[int]], **options: object) -> list[Reply]:
        """`generate`, awaited. Cancelling the task cancels all requests."""
        requests = await asyncio.to_thread(self._requests, prompts, options)
        replies: dict[int, Reply] = {}
        async with aclosing(Events(self, requests, bounded=False)) as events:
            async for index, event in events:
                if isinstance(event, Reply):
                    replies[index] = event
        return [replies[index] for index in range(len(requests))]

    def answers(self, requests: Sequence[Request]) -> list[Reply]:
        """The replies to requests, in their order; as many as there are may wait."""
        return self._wait_for(requests, bounded=False)

    def events(self, requests: Sequence[Request]) -> Events:
        """Queue the requests and return their events for the running event loop. Raises QueueFullError."""
        return Events(self, requests)

    @abstractmethod
    def request(self, messages: Chat, /, **options: object) -> Request:
        """Encode a conversation."""

    @abstractmethod
    def request_text(self, text: str | Sequence[int], *, special_tokens: bool = True, **options: object) -> Request:
        """Encode a text to continue."""

    @abstractmethod
    def ask(self, requests: Sequence[Request], tell: Tell, *, bounded: bool = True) -> list[Ticket]:
        """Queue all requests, or none."""

    @abstractmethod
    def require_process(self) -> None:
        """Raise ModelClosedError in a forked child."""

    @abstractmethod
    def require_other_thread(self) -> None:
        """Raise ConfigurationError in the session's own thread."""

    def _requests(self, prompts: str | Sequence[str | Sequence[int]], options: Mapping[str, Any]) -> list[Request]:
        return [self.request_text(text, **options) for text in _each(prompts)]

    def _wait_for(self, requests: Sequence[Request], *, bounded: bool = True) -> list[Reply]:
        """All replies, in order; the first failure is raised and cancels the rest."""
        self.require_other_thread()
        inbox: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        replies: dict[int, Reply] = {}
        tickets = self.ask(requests, lambda index, event: inbox.put((index, event)), bounded=bounded)
        try:
            while len(replies) < len(requests):
                index, event = inbox.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Reply):
                    replies[index] = event
        finally:
            cancel_all(tickets)
        return [replies[index] for index in range(len(requests))]

    def _pieces(self, request: Request) -> Generator[str, None, Reply]:
        self.require_other_thread()
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        tickets = self.ask([request], lambda _, event: inbox.put(event))
        try:
            while not isinstance(event := inbox.get(), Reply):
                if isinstance(event, BaseException):
                    raise event
                if event.text:
                    yield event.text
                    self.require_process()  # the caller may have forked in between
            return event
        finally:
            cancel_all(tickets)


def _each(prompts: object) -> list[str | Sequence[int]]:
    """Each prompt separately. Raises ConfigurationError for anything but a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    found = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(found, Mapping | bytes) or not isinstance(found, Iterable):
        raise ConfigurationError(f"expected a text or a list of prompts, not a value of type {type(prompts).__name__}")
    found = list(found)
    if found and isinstance(found[0], int):
        raise ConfigurationError("expected a list of prompts, not one list of token ids: put it in brackets")
    return found
