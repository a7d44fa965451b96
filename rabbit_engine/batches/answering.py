"""Answers lines with a session that is opened for them, here or on a machine of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rabbit_engine.batches.choices import Choices
from rabbit_engine.batches.inputs import InputLine
from rabbit_engine.batches.tasks import require_task
from rabbit_engine.batches.window import Answered, Window
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.prefixes import PrefixStore
from rabbit_engine.server.openai.bodies import Bodies
from rabbit_engine.sessions import Session
from rabbit_engine.sessions.encoding import require_text_generation

_TELL_S = 0.5
"""The progress is told this often while no line ends."""


def open_session(model: SessionModel, choices: Choices, prefix_store: PrefixStore | None) -> Session:
    """The session of a batch. Raises for a task that every line would fail at."""
    _require_task(model, choices)
    return Session(
        model,
        max_requests=choices.max_requests,
        max_queue=_most_texts(choices),
        max_new_tokens=choices.max_new_tokens,
        overflow=choices.overflow,
        exact=choices.exact,
        prefix_store=prefix_store,
    )


def open_window(session: Session, name: str, choices: Choices) -> Window:
    """Room for lines under way; answers call the model `name`."""
    return Window(session, Bodies(session, name), choices.task, name, _most_texts(choices))


def answer(window: Window, lines: Iterable[InputLine], tell: Callable[[], object] = lambda: None) -> Iterator[Answered]:
    """Every line with its answer, in the order in which they end. `tell` is called between them, and while none ends."""
    for line in lines:
        while window.is_full:
            yield from _collect(window, tell)
        if (refused := window.submit(line)) is not None:
            yield refused
        yield from _collect(window, tell, timeout_s=0)
    while len(window):
        yield from _collect(window, tell)


def _collect(window: Window, tell: Callable[[], object], timeout_s: float = _TELL_S) -> Iterator[Answered]:
    yield from window.finished(timeout_s)
    tell()


def _most_texts(choices: Choices) -> int:
    return 2 * choices.max_requests


def _require_task(model: SessionModel, choices: Choices) -> None:
    if choices.task in ("chat", "complete"):
        require_text_generation(model)
    if choices.task == "chat" and getattr(model.tokenizer, "chat_template", None) is None:
        raise ConfigurationError(f'{type(model).__name__} has no chat template, it only continues texts: give task="complete"')
    require_task(model, choices.task)
