"""The keys that clients send, from a file, and the limits of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rabbit_engine.errors import ConfigurationError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_NAMED = re.compile(r"(\S+):\s+(.*)\Z")
_LIMIT = re.compile(r"(requests|per_minute)=(\d{1,6})\Z")
_MOST_KEYS = 1000


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the server. `requests` of it may be under way at once, and `per_minute` may begin in any minute; None does not
    limit them."""

    name: str
    secret: str
    requests: int | None = None
    per_minute: int | None = None


def read_keys(path: Path) -> list[Key]:
    """The keys in a file: one a line, as `KEY` or `NAME: KEY`, with `requests=N` and `per_minute=N` after it for limits.

    Empty lines and those that begin with `#` are comments. Raises ConfigurationError that names the line, and never the key.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read --api-key-file {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if (text := line.strip()) and not text.startswith("#"):
            try:
                found.append(_parse(text, number))
            except ConfigurationError as error:
                raise ConfigurationError(f"--api-key-file {path}, line {number}: {error}") from error
    if not found:
        raise ConfigurationError(f"--api-key-file {path} has no key: write one a line")
    _require_distinct(found, path)
    return found


def _parse(text: str, number: int) -> Key:
    name, rest = f"key-{number}", text
    if (named := _NAMED.match(text)) is not None:
        name, rest = named.groups()
        if not _NAME.match(name):
            raise ConfigurationError("a name has up to 64 letters, digits, '.', '_' and '-'")
    secret, *limits = rest.split()
    if not secret.isascii() or not secret.isprintable():
        raise ConfigurationError("a key is ASCII: clients send it in a header")
    return Key(name, secret, **_limits(limits))


def _limits(words: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        limit = _LIMIT.match(word)
        if limit is None or int(limit[2]) < 1 or limit[1] in found:
            raise ConfigurationError("after the key only requests=N and per_minute=N may stand, with N from 1, each once")
        found[limit[1]] = int(limit[2])
    return found


def _require_distinct(keys: Sequence[Key], path: Path) -> None:
    if len(keys) > _MOST_KEYS:
        raise ConfigurationError(f"--api-key-file {path} has {len(keys)} keys, more than {_MOST_KEYS}")
    names: dict[str, str] = {}
    for key in keys:
        if key.name in names:
            raise ConfigurationError(f"--api-key-file {path}: two keys are called {key.name!r}")
        if key.secret in names.values():
            raise ConfigurationError(f"--api-key-file {path}: {key.name!r} has the key of another name")
        names[key.name] = key.secret
