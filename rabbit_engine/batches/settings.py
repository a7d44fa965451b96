"""The options that change answers: an output file holds answers with one set of them only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, urlencode


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """Options by name, in the order in which they are told; one that is not set is left out."""

    values: Mapping[str, str]

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """Those that are not None, as text: `torch.float16` is "float16"."""
        return cls({name: str(value).removeprefix("torch.") for name, value in options.items() if value is not None})

    @classmethod
    def decode(cls, text: str) -> Self:
        """What `encode` returned."""
        return cls(dict(parse_qsl(text, keep_blank_values=True)))

    def encode(self) -> str:
        """`model=a&task=chat`: ASCII without quotes and backslashes."""
        return urlencode(self.values, safe="/:")

    def difference(self, former: BatchSettings) -> tuple[str, str]:
        """What differs from `former`, as texts: `("task=chat, no dtype", "no task, dtype=float16")`, the former's first."""
        names = sorted({name for name, _ in former.values.items() ^ self.values.items()})
        return _told(former, names), _told(self, names)


def _told(settings: BatchSettings, names: Iterable[str]) -> str:
    return ", ".join(f"{name}={settings.values[name]}" if name in settings.values else f"no {name}" for name in names)
