"""What travels to the machines of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from rabbit_engine.batches.choices import Choices, label_of
from rabbit_engine.cluster.machines import own_versions
from rabbit_engine.errors import ConfigurationError, MachinesDifferError

_PATHS = ("layer_shards_saving_path", "cache_dir")
"""Keywords for loading that name a folder: relative ones mean the driver's."""


@dataclass(frozen=True, slots=True)
class Workers:
    """The cluster at `address`, and how many workers load the model; None is one on each machine that has the memory."""

    address: str
    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and (not isinstance(self.count, int) or self.count < 1):
            raise ConfigurationError(f"workers={self.count!r} is not an integer from 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """How a worker loads the model and answers lines. `prefix_bytes` is the size of its machine's store of prefixes: none
    with 0, the default with None. `versions` are the driver's, which a worker must have."""

    model: str
    label: str
    choices: Choices
    loading: Mapping[str, Any]
    prefix_bytes: int | None
    versions: Mapping[str, str]

    @classmethod
    def of(cls, model: str | Path, choices: Choices, loading: Mapping[str, Any], prefix_bytes: int | None = 0) -> Self:
        """An order whose paths do not depend on the folder in which a worker runs."""
        path = Path(model).expanduser()
        name = str(path.resolve()) if path.exists() else str(model)
        folders = {key: Path(loading[key]).expanduser().absolute() for key in _PATHS if loading.get(key)}
        return cls(
            model=name,
            label=label_of(str(model)),
            choices=choices,
            loading={**loading, **folders},
            prefix_bytes=prefix_bytes,
            versions=own_versions(),
        )

    def pinned(self, commit: str | None) -> Self:
        """The same, with the files that a machine has: of this commit, if the model is a repo of the Hub."""
        revision = {} if commit is None else {"revision": commit}
        return replace(self, loading={**self.loading, **revision, "local_files_only": True})

    def require_versions(self) -> None:
        """Raise MachinesDifferError if this process has other versions than the driver: its machine may have joined later."""
        for package, version in own_versions().items():
            if _release(version) != _release(self.versions[package]):
                raise MachinesDifferError(f"it has {package} {version}, the driver {self.versions[package]}: install that")


def _release(version: str) -> str:
    """The version without its build, such as `+cpu`."""
    return version.partition("+")[0]


class LineAnswer(NamedTuple):
    """The answer of the line `number` whose bytes have the `checksum`; `tokens` were generated for it and others since the
    last answer. `error` is None or JSON."""

    number: int
    checksum: int
    custom_id: str
    response: str
    error: str | None
    tokens: int


class Failure(NamedTuple):
    """What ended a worker's part of the batch: the name of an error's class, its message, and the machine."""

    kind: str
    message: str
    machine: str
