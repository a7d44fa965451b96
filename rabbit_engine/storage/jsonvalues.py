"""Untrusted JSON: parsed strictly, then read field by field as values of known types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import xxhash

_NAME_BYTES = 255
"""The longest name that a file can have on today's file systems."""


def parse(raw: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError if it is not JSON, repeats a key or nests too deep."""
    try:
        return json.loads(raw, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"it repeats a key, among {', '.join(list(found)[:3])}")
    return found


def sealed(value: Any) -> dict[str, Any]:
    """A JSON value with its checksum, to be written: for what would change an answer if it were damaged."""
    return {"value": value, "xxh3": _checksum(value)}


def unsealed(kept: Any) -> Any:
    """The value of `sealed`; None for anything else, or if it has changed."""
    value = kept.get("value") if isinstance(kept, dict) else None
    return value if isinstance(kept, dict) and kept.get("xxh3") == _checksum(value) else None


def _checksum(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


class OutsideError(ValueError):
    """A name that points outside its folder."""


def file_name(value: object) -> str:
    """The name of a file inside a folder. Raises OutsideError for a path that leaves it, ValueError for any other value."""
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a file name")
    posix, windows = PurePosixPath(value), PureWindowsPath(value)
    if posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts):
        raise OutsideError(f"{shown(value)} leads outside the folder")
    sizes = [len(part.encode(errors="replace")) for part in posix.parts]
    if not sizes or max(sizes) > _NAME_BYTES or sum(sizes) > 4 * _NAME_BYTES or not value.isprintable():
        raise ValueError(f"{shown(value)} is not a file name")
    return value


def shown(value: object) -> str:
    """A value, shortened for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object, read by key and type. Each method raises ValueError, which names the key and the value."""

    values: Mapping[str, Any]
    where: str = ""

    @classmethod
    def of(cls, value: object, where: str = "") -> Fields:
        """The fields of a value that must be an object."""
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'it'} is {shown(value)}, not an object")
        return cls(value, where)

    def take(self, key: str) -> Any:
        """A required value of any type."""
        if key not in self.values:
            raise ValueError(f"{self._at(key)} is missing")
        return self.values[key]

    def text(self, key: str) -> str:
        """A non-empty string."""
        value = self.take(key)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{self._at(key)} is {shown(value)}, not text")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string, or None if it is null or missing."""
        return None if self.values.get(key) is None else self.text(key)

    def count(self, key: str) -> int:
        """An integer from 0."""
        return counts([self.take(key)], self._at(key))[0]

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.take(key)
        if not isinstance(value, bool):
            raise ValueError(f"{self._at(key)} is {shown(value)}, neither true nor false")
        return value

    def items(self, key: str) -> list[Any]:
        """A list."""
        value = self.take(key)
        if not isinstance(value, list):
            raise ValueError(f"{self._at(key)} is {shown(value)}, not a list")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of different file names."""
        return different([file_name(item) for item in self.items(key)], self._at(key))

    def rows(self, key: str) -> list[Fields]:
        """A list of objects."""
        return [Fields.of(item, f"{self._at(key)}[{index}]") for index, item in enumerate(self.items(key))]

    def fields(self, key: str) -> Fields:
        """An object."""
        return Fields.of(self.take(key), self._at(key))

    def texts(self, key: str) -> dict[str, str]:
        """An object whose values are all strings, possibly empty."""
        inner = self.fields(key)
        other = next((name for name, value in inner.values.items() if not isinstance(value, str)), None)
        if other is not None:
            raise ValueError(f"{inner._at(other)} is {shown(inner.values[other])}, not text")
        return dict(inner.values)

    def _at(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key


def counts(value: object, where: str) -> tuple[int, ...]:
    """A list of integers from 0, none of them a float, a boolean or beyond 63 bits. Raises ValueError."""
    if not isinstance(value, list) or any(type(item) is not int or not 0 <= item < 2**63 for item in value):
        raise ValueError(f"{where} is {shown(value)}, not made of integers from 0")
    return tuple(value)


def different(values: list[str], where: str) -> tuple[str, ...]:
    """The same values; no two may be equal. Raises ValueError."""
    twice = next((value for value in values if values.count(value) > 1), None) if len(set(values)) < len(values) else None
    if twice is not None:
        raise ValueError(f"{where} has {shown(twice)} twice")
    return tuple(values)
