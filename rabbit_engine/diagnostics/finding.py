"""What a check of this machine found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "info", "warn", "fail"]
Number = int | float | str | bool | None | Sequence[float] | Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One named fact: `value` in words, `numbers` for programs (bytes, bytes per second, versions), `advice` if there is
    something to do. A `warn` costs speed, memory or a feature; with a `fail` models do not run."""

    name: str
    status: Status
    value: str
    numbers: Mapping[str, Number] = field(default_factory=dict)
    advice: str = ""
