"""Follows one answer to its end: shows its text as it is generated, and the progress of the pass if a token takes long."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

from rabbit_engine.chat.interrupt import Interrupt
from rabbit_engine.chat.screen import Screen
from rabbit_engine.sessions import Piece, Reply, Request, Session
from rabbit_engine.streaming import PassProgress
from rabbit_engine.utils.sizes import format_rate, format_seconds

PATIENCE_S = 0.25
"""How long a token may take before the status line appears."""

_TICK_S = 0.1

Event = Piece | Reply | BaseException


def follow(session: Session, request: Request, screen: Screen, interrupt: Interrupt) -> Reply:
    """The reply, once all of it is on the screen; after Ctrl-C, the part so far. Raises what the model raises."""
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    (ticket,) = session.ask([request], lambda _, event: inbox.put(event))
    follower = _Follower(session, screen, interrupt, len(request.prompt.ids))
    try:
        return follower.run(inbox, ticket.cancel)
    finally:
        ticket.cancel()
        screen.end()


class _Follower:
    def __init__(self, session: Session, screen: Screen, interrupt: Interrupt, prompt_tokens: int) -> None:
        self._session, self._screen, self._interrupt = session, screen, interrupt
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self._last_s = time.perf_counter()

    def run(self, inbox: queue.SimpleQueue[Event], cancel: Callable[[], None]) -> Reply:
        while True:
            if self._interrupt.pressed:
                cancel()
            try:
                event = inbox.get(timeout=_TICK_S)
            except queue.Empty:
                self._tell()
                continue
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Reply):
                return event
            self._take(event)

    def _take(self, piece: Piece) -> None:
        told = self._screen.shows
        if piece.text:
            self._screen.write(piece.text)
        slow = time.perf_counter() - self._last_s > PATIENCE_S
        self._tokens += piece.token is not None
        self._last_s = time.perf_counter()
        if told and slow:  # the next token will probably be slow, too
            self._screen.show(self._status())

    def _tell(self) -> None:
        if self._screen.shows or time.perf_counter() - self._last_s > PATIENCE_S:
            self._screen.show(self._status())

    def _status(self) -> str:
        if self._interrupt.pressed:
            return "stopping ..."
        return status(self._session.progress, self._tokens, self._prompt_tokens, self._screen.width - 1)


def status(progress: PassProgress | None, tokens: int, prompt_tokens: int, width: int) -> str:
    """The number of the current token, and the progress of its pass; in at most `width` columns if possible."""
    which = f"token {tokens + 1}" if tokens else f"prompt of {prompt_tokens} tokens"
    if progress is None:
        return f"{which} ..."
    place = f"layer {progress.layer}/{progress.layers}"
    left = "" if progress.remaining_s is None else f", {format_seconds(progress.remaining_s)} left"
    rate = f", {format_rate(progress.bytes_read, progress.elapsed_s)}"
    texts = (f"{which}: {progress}", str(progress), f"{place}{rate}{left}", f"{place}{left}")
    return next((text for text in texts if len(text) <= width), texts[-1])
