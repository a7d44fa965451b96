"""What is known of a request while it is answered, and its line in the access log: never a prompt or an answer."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path

from starlette.types import Scope

from rabbit_engine.errors import ConfigurationError

_SCOPE = "rabbit_engine.visit"
_MOST_PATH = 200


@dataclass(slots=True)
class Visit:
    """One request. `key` is the name of its key, `model` the one that it uses, empty as long as that is not known."""

    method: str
    path: str
    client: str
    key: str = ""
    model: str = ""
    status: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    is_large: bool = False
    _began_s: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, scope: Scope) -> Visit:
        """That of a new request, which the scope then carries."""
        visit = cls(scope["method"], scope["path"], (scope.get("client") or ("", 0))[0])
        scope[_SCOPE] = visit
        return visit

    @staticmethod
    def of(scope: Scope) -> Visit:
        """That of a request under way."""
        found: Visit = scope[_SCOPE]
        return found

    def line(self) -> str:
        """As a JSON object on one line."""
        found = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "key": self.key,
            "client": self.client,
            "method": self.method[:_MOST_PATH],
            "path": self.path[:_MOST_PATH],
            "model": self.model,
            "status": self.status,
            "seconds": round(time.monotonic() - self._began_s, 3),
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": self.answer_tokens,
        }
        return json.dumps(found)


class AccessLog:
    """Writes a line for each request to a file, which may be moved away while it is used, or to stderr for "-".

    Raises ConfigurationError if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            to_stderr = str(path) == "-"
            self._handler = logging.StreamHandler(sys.stderr) if to_stderr else WatchedFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"cannot write --access-log {path}: {error}") from error

    def write(self, visit: Visit) -> None:
        """Add the line of a request that has ended. A line that cannot be written is reported on stderr, and lost."""
        self._handler.handle(logging.makeLogRecord({"msg": visit.line()}))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()
