"""`batch`: checks both files, loads the model if a line is left, and answers line by line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rabbit_engine.batches.answering import answer, open_session, open_window
from rabbit_engine.batches.choices import Choices, label_of
from rabbit_engine.batches.cluster import Order, Workers, answer_on_cluster
from rabbit_engine.batches.inputs import InputFile, InputLine, Numbered
from rabbit_engine.batches.lines import Task
from rabbit_engine.batches.outputs import OutputFile
from rabbit_engine.batches.progress import BatchProgress, BatchReport
from rabbit_engine.batches.settings import BatchSettings
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model import AutoModel
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.prefixes import PrefixStore
from rabbit_engine.sessions.prompts import Overflow

_CHANGES_ANSWERS = ("compression", "revision", "gguf_file")
"""Keywords of `from_pretrained` that an output file must keep, besides the dtype."""


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
    cluster: str | None = None,
    workers: int | None = None,
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
        cluster: the address of a Ray cluster whose machines answer the lines, each with a model of its own: "auto",
            "HOST:PORT", "ray://HOST:PORT" or "local". `max_requests` and the keywords for loading are then each worker's.
        workers: how many load the model; by default one on each machine of the cluster that has the memory.

    Raises:
        ConfigurationError: for files that cannot be used: a `custom_id` that two lines share, an output file of other input
            or other options, or one that another process writes.
        ClusterError: for a cluster that does not answer, or whose machines cannot run the model.
    """
    if workers is not None and cluster is None:
        raise ConfigurationError(f"workers={workers} is for a cluster: give its address, or leave it out")
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
        if cluster is not None:
            order = Order.of(_require_name(model), choices, loading)
            return opened.run_on(Workers(cluster, workers), order, on_progress)
        with _here(model, loading) as loaded:
            return opened.run(loaded, on_progress)


@contextmanager
def _here(model: str | Path | SessionModel, loading: dict[str, Any]) -> Iterator[SessionModel]:
    """The model, loaded on this machine. One that was loaded already stays open."""
    if isinstance(model, str | Path):
        with AutoModel.from_pretrained(model, **loading) as loaded:
            yield loaded
    elif loading:
        raise ConfigurationError(f"the model is loaded: {next(iter(loading))} has no effect")
    else:
        yield model


class BatchJob:
    """An input file and its output file, checked against each other before a model is loaded. Raises as `batch` does."""

    def __init__(
        self, name: str, input_file: str | Path, output_file: str | Path, choices: Choices, loading: dict[str, Any]
    ) -> None:
        self._name, self._choices = label_of(name), choices
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
        with open_session(model, self._choices, prefix_store) as session:
            window = open_window(session, self._name, self._choices)
            self._began_s = time.monotonic()

            def tell() -> None:
                self._tokens = window.tokens
                self._tell(on_progress, session.running)

            try:
                for answered in answer(window, self.lines(), tell):
                    self.write(answered.line, answered.custom_id, answered.response, answered.error)
            finally:
                self._tokens = window.tokens
                window.cancel()
        return self.report()

    def run_on(self, workers: Workers, order: Order, on_progress: Callable[[BatchProgress], None] | None = None) -> BatchReport:
        """Answer the lines that are left with workers of a cluster, each of which loads the model itself. Raises as
        `answer_on_cluster` does."""
        self._began_s = time.monotonic()

        def tell(running: int, tokens: int) -> None:
            self._tokens += tokens
            self._tell(on_progress, running)

        answer_on_cluster(workers, order, self, tell)
        return self.report()

    def lines(self) -> Iterator[InputLine]:
        """The lines without an answer."""
        return (line for line in self._source.lines() if not self._target.has(line))

    @property
    def left(self) -> int:
        """How many lines have no answer."""
        return self._source.count - self._target.count

    def write(self, line: Numbered, custom_id: str, response: Mapping[str, object], error: object) -> None:
        """Write the answer of a line, unless it has one."""
        if not self._target.has(line):
            self._target.append(line, custom_id, response, error)

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

    def _tell(self, on_progress: Callable[[BatchProgress], None] | None, running: int) -> None:
        if on_progress is not None:
            seconds, target = time.monotonic() - self._began_s, self._target
            on_progress(
                BatchProgress(self._source.count, target.count, target.failed, self._resumed, running, self._tokens, seconds)
            )


def _require_name(model: str | Path | SessionModel) -> str | Path:
    if not isinstance(model, str | Path):
        raise ConfigurationError("the workers of a cluster load the model themselves: give its name, not a loaded model")
    return model


def _name_of(model: str | Path | SessionModel) -> str:
    return str(model) if isinstance(model, str | Path) else str(model.config.name_or_path)


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
