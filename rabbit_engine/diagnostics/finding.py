"""What the checks of a machine or a cluster found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rabbit_engine import __version__

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination(ABC):
    """All findings about one thing, and whether models run on it."""

    findings: tuple[Finding, ...]

    @property
    def can_run(self) -> bool:
        """Whether nothing prevents models from running, on any of the machines."""
        return all(finding.status != "fail" for finding in self.findings)

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What was examined and measured, for JSON; rates are in bytes per second."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return {"version": __version__, "can_run": self.can_run, **self.facts(), "findings": findings}
