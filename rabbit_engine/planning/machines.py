"""The machines that share a model, or the devices of one: what each holds, reads and computes. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.utils.sizes import parse_bytes, parse_rate

DEFAULT_SECONDS_PER_BYTE = 1 / 20e9
"""Seconds to compute with a byte of weights, if nobody measured: the memory of an ordinary PC gives 20 GB/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine, or one device of a machine, that takes some of a model's layers.

    `memory_bytes` are for weights, their buffers and the caches of texts. It reads weights at `disk_rate` bytes per second; at 0
    it streams nothing. Devices that read from the same `disk` share its rate. To compute with one text takes
    `seconds_per_byte` of the weights it uses and `seconds_per_layer` besides; each further text of the same pass takes
    `further_text` times as much: 1 if texts are computed one by one, less if their products are shared. Its link to the driver
    moves `link_rate` bytes per second, and a message takes `link_latency_s` besides, each way. Machines that compute on the same
    `processors` keep `processors_share` of them busy, each, while they compute: with more than all of them they wait for each
    other. `source` is the origin of the rates. Raises ConfigurationError.
    """

    name: str
    memory_bytes: int
    disk_rate: float = 2e9
    seconds_per_byte: float = DEFAULT_SECONDS_PER_BYTE
    seconds_per_layer: float = 0.0
    further_text: float = 1.0
    link_rate: float = math.inf
    link_latency_s: float = 0.0
    disk: str = ""
    processors: str = ""
    processors_share: float = 1.0
    source: str = "given"

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigurationError("a machine needs a name")
        for field in ("memory_bytes", "disk_rate", "seconds_per_byte", "seconds_per_layer", "further_text", "link_latency_s"):
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"{field}={value!r} of machine {self.name!r}: give a number from zero")
        if not self.link_rate > 0:
            raise ConfigurationError(f"link_rate={self.link_rate!r} of machine {self.name!r}: give bytes per second")
        if not 0 < self.processors_share <= 1:
            raise ConfigurationError(f"processors_share={self.processors_share!r} of machine {self.name!r}: give a part of 1")

    @property
    def disk_name(self) -> str:
        """The disk that it reads from: its own, unless several devices share one."""
        return self.disk or self.name

    @property
    def processors_name(self) -> str:
        """The processors that it computes on: its own, unless several machines share them."""
        return self.processors or self.name


_RATES = ("disk_rate", "link_rate")
_NUMBERS = {"link_latency_s", "seconds_per_byte", "seconds_per_layer", "further_text", "processors_share"}
_TEXTS = ("disk", "processors")
_KNOWN = {"name", "count", "memory", "compute_rate", *_TEXTS, *_RATES, *_NUMBERS}


def read_machines(path: Path) -> tuple[Machine, ...]:
    """The machines that a JSON file lists, the driver first: see `parse_machines`. Raises ConfigurationError."""
    try:
        return parse_machines(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{path} is no list of machines: {error}") from error


def parse_machines(listed: object) -> tuple[Machine, ...]:
    """Machines from a list of objects, the driver first: `[{"name": "pc", "count": 4, "memory": "13GB", "disk_rate": "3GB/s",
    "compute_rate": "25GB/s", "link_rate": "117MB/s", "link_latency_s": 0.001}]`.

    `count` of several are named `pc1`, `pc2` and so on. `compute_rate` is 1 / `seconds_per_byte`; the other keys are fields of
    `Machine`, and may be left out. Raises ConfigurationError.
    """
    if not isinstance(listed, list) or not listed or not all(isinstance(item, dict) for item in listed):
        raise ConfigurationError('machines are a JSON list of objects such as {"name": "pc", "memory": "13GB"}, the driver first')
    found = [machine for item in listed for machine in _parse(item)]
    names = [machine.name for machine in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"several machines are named {', '.join(twice)}: give each a name of its own, or a count")
    return tuple(found)


def _parse(item: Mapping[str, Any]) -> list[Machine]:
    if unknown := sorted(item.keys() - _KNOWN):
        raise ConfigurationError(f"a machine has no {unknown[0]!r}: known are {', '.join(sorted(_KNOWN))}")
    name, count = item.get("name"), item.get("count", 1)
    if not isinstance(name, str) or not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigurationError(f"name={name!r}, count={count!r} of a machine: give a text and a number from one")
    try:
        fields: dict[str, Any] = {field: float(item[field]) for field in _NUMBERS if field in item}
        fields |= {field: float(parse_rate(str(item[field]))) for field in _RATES if field in item}
        if "compute_rate" in item:
            fields["seconds_per_byte"] = 1 / parse_rate(str(item["compute_rate"]))
        fields["memory_bytes"] = parse_bytes(item["memory"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigurationError(f"machine {name!r}: {told}") from error
    names = [name] if count == 1 else [f"{name}{index + 1}" for index in range(count)]
    fields |= {field: str(item.get(field, "")) for field in _TEXTS}
    return [Machine(name=each, **fields) for each in names]
