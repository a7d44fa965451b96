"""How a batch answers its lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rabbit_engine.batches.lines import TASKS, Task
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.sessions.prompts import Overflow


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


def label_of(name: str) -> str:
    """What answers call the model: a repo id, or the name of the folder or file, wherever it lies."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name
