"""`batch`: checks both files, loads the model if a line is left, and answers line by line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rabbit_engine.batches.inputs import InputFile
from rabbit_engine.batches.lines import TASKS, Task
from rabbit_engine.batches.outputs import OutputFile
from rabbit_engine.batches.progress import BatchProgress, BatchReport
from rabbit_engine.batches.settings import BatchSettings
from rabbit_engine.batches.tasks import require_task
from rabbit_engine.batches.window import Answered, Window
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model import AutoModel
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.prefixes import PrefixStore
from rabbit_engine.server.openai.bodies import Bodies
from rabbit_engine.sessions import Session
from rabbit_engine.sessions.encoding import require_text_generation
from rabbit_engine.sessions.prompts import Overflow

_TELL_S = 0.5
"""The progress is told this often while no line ends."""

_CHANGES_ANSWERS = ("compression", "revision", "gguf_file")
"""Keywords of `from_pretrained` that an output file must keep, besides the dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """How lines are answered; each is an argument of `batch`."""

    task: Task | None = None
    max_requests: int = 256
    max_new_tokens: int = 1024
    overflow: Overflow = "refuse"
    exact: bool = True
    retry_failed: bool = False

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise ConfigurationError(f"task={self.task!r}: expected one of {', '.join(TASKS)}")


def batch(
    model: str | Path | SessionModel,
    input_file: str | Path,
    output_file: str | Path,
    *,
    task: Task | None = None,
    max_requests: int = 256,
    max_new_tokens: int = 1024,
    overflow: Overflow = "refuse",
    exact: bool = True,
    retry_failed: bool = False,
    on_progress: Callable[[BatchProgress], None] | None = None,
    **loading: Any,
) -> BatchReport:
    """Answer every line of a file: each pass over the weights serves as many lines as memory holds.

    Started again, it goes on where it ended, however it ended: the output file says which lines are answered. Answers are
    in the order in which they end; `custom_id` tells them apart. A line that cannot be answered gets an error, and the
    others go on.

    Args:
        model: a loaded model, or what `AutoModel.from_pretrained` takes, with its keywords as `loading`.
        input_file: JSON lines: OpenAI's batch format, or plain `{"prompt": ...}`, `{"messages": ...}`, `{"input": ...}`.
        output_file: OpenAI's format: `id`, `custom_id`, `response`, `error`. Appended to if it is of the same input.
        task: "chat", "complete", "embed", "classify", "rerank" or "score"; None takes each line's own.
        max_requests: texts under way at once; memory may allow fewer.
        max_new_tokens: the length of an answer whose line sets none.
        overflow: as of `Session`.
        exact: as of `Session`.
        retry_failed: take the lines that failed out of the output file, and answer them again.
        on_progress: called as lines end, and about twice a second while none does.

    Raises:
        ConfigurationError: for files that cannot be used: a `custom_id` that two lines share, an output file of other input
            or other options, or one that another process writes.
    """
    choices = Choices(
        task=task,
        max_requests=max_requests,
        max_new_tokens=max_new_tokens,
        overflow=overflow,
        exact=exact,
        retry_failed=retry_failed,
    )
    with BatchJob(_name_of(model), input_file, output_file, choices, loading) as opened:
        if opened.is_done:
            return opened.report()
        if isinstance(model, str | Path):
            with AutoModel.from_pretrained(model, **loading) as loaded:
                return opened.run(loaded, on_progress)
        if loading:
            raise ConfigurationError(f"the model is loaded: {next(iter(loading))} has no effect")
        return opened.run(model, on_progress)


class BatchJob:
    """An input file and its output file, checked against each other before a model is loaded. Raises as `batch` does."""

    def __init__(
        self, name: str, input_file: str | Path, output_file: str | Path, choices: Choices, loading: dict[str, Any]
    ) -> None:
        self._name, self._choices = _label(name), choices
        self._source = InputFile(Path(input_file))
        settings = _settings_of(self._name, choices, loading)
        self._target = OutputFile(Path(output_file), self._source, settings, retry_failed=choices.retry_failed)
        self._resumed = self._target.count
        self._began_s = time.monotonic()
        self._tokens = 0

    @property
    def is_done(self) -> bool:
        """Whether no line is left."""
        return self._target.count == self._source.count

    @property
    def resumed(self) -> int:
        """The number of lines that the output file answered when it was opened."""
        return self._resumed

    @property
    def retried(self) -> int:
        """The number of lines that failed before and are answered again."""
        return self._target.retried

    def run(
        self,
        model: SessionModel,
        on_progress: Callable[[BatchProgress], None] | None = None,
        *,
        prefix_store: PrefixStore | None = None,
    ) -> BatchReport:
        """Answer the lines that are left."""
        self._require_task(model)
        choices, most = self._choices, 2 * self._choices.max_requests
        with Session(
            model,
            max_requests=choices.max_requests,
            max_queue=most,
            max_new_tokens=choices.max_new_tokens,
            overflow=choices.overflow,
            exact=choices.exact,
            prefix_store=prefix_store,
        ) as session:
            window = Window(session, Bodies(session, self._name), choices.task, self._name, most)
            self._began_s = time.monotonic()
            try:
                self._answer_all(window, lambda: on_progress and on_progress(self._progress(session, window)))
            finally:
                self._tokens = window.tokens
                window.cancel()
        return self.report()

    def report(self) -> BatchReport:
        """What was done so far."""
        seconds = time.monotonic() - self._began_s
        return BatchReport(self._source.count, self._target.failed, self._resumed, self._tokens, seconds)

    def close(self) -> None:
        """Close the output file."""
        self._target.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer_all(self, window: Window, tell: Callable[[], object]) -> None:
        for line in self._source.lines():
            if self._target.has(line):
                continue
            while window.is_full:
                self._collect(window, tell)
            if (refused := window.submit(line)) is not None:
                self._write(refused)
            self._collect(window, tell, timeout_s=0)
        while len(window):
            self._collect(window, tell)

    def _collect(self, window: Window, tell: Callable[[], object], timeout_s: float = _TELL_S) -> None:
        for answered in window.finished(timeout_s):
            self._write(answered)
        tell()

    def _write(self, answered: Answered) -> None:
        self._target.append(answered.line, answered.custom_id, answered.response, answered.error)

    def _progress(self, session: Session, window: Window) -> BatchProgress:
        seconds, target = time.monotonic() - self._began_s, self._target
        return BatchProgress(
            self._source.count, target.count, target.failed, self._resumed, session.running, window.tokens, seconds
        )

    def _require_task(self, model: SessionModel) -> None:
        """Refuse a task that every line would fail at."""
        if self._choices.task in ("chat", "complete"):
            require_text_generation(model)
        if self._choices.task == "chat" and getattr(model.tokenizer, "chat_template", None) is None:
            raise ConfigurationError(
                f'{type(model).__name__} has no chat template, it only continues texts: give task="complete"'
            )
        require_task(model, self._choices.task)


def _name_of(model: str | Path | SessionModel) -> str:
    return str(model) if isinstance(model, str | Path) else str(model.config.name_or_path)


def _label(name: str) -> str:
    """What answers call the model: a repo id, or the name of the folder or file, wherever it lies."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _settings_of(name: str, choices: Choices, loading: dict[str, Any]) -> BatchSettings:
    """What changes the answers."""
    own = {
        "model": name,
        "task": choices.task,
        "max_new_tokens": choices.max_new_tokens,
        "overflow": choices.overflow,
        "dtype": loading.get("dtype", loading.get("torch_dtype")),
    }
    return BatchSettings.of({**own, **{key: loading.get(key) for key in _CHANGES_ANSWERS}})
