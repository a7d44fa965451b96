"""What decoding encoded weights costs a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.plan import Decoding, Plan
from rabbit_engine.storage.encoding import Encoding
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.streaming import Unit

Rate = Callable[[TensorEntry], float]
"""Bytes per second, of decoded values, for a weight."""


@dataclass(slots=True)
class _Rates:
    """Measures the rate of each kind of encoding once."""

    measure: Rate
    found: dict[type[Encoding], float]

    def seconds(self, entry: TensorEntry) -> float:
        inside = entry
        while inside.encoding is None:
            inside = next(part for part in inside.parts if part.is_encoded)
        kind = type(inside.encoding)
        if kind not in self.found:
            self.found[kind] = self.measure(entry)
        return entry.decoded_bytes / self.found[kind]


def decoding_of(plan: Plan, partition: Partition, fused: bool | None, measure: Rate) -> Decoding:
    """The bytes that a pass with one token decodes, and the seconds that takes: each unit that is stored encoded, but not the
    weights that are multiplied by in their stored form, and of experts those that a token uses. `fused` as in
    `StreamConfig.fused_products`."""
    rates, nbytes, seconds = _Rates(measure, {}), 0, 0.0
    for unit, times in _decoded_units(plan, partition):
        packed = partition.packed(unit, fused)
        for entry in (weight.entry for weight in unit.encoded if weight.entry.name not in packed):
            nbytes += times * entry.decoded_bytes
            seconds += times * rates.seconds(entry)
    return Decoding(nbytes, seconds)


def _decoded_units(plan: Plan, partition: Partition) -> Iterable[tuple[Unit, int]]:
    """Each unit that is decoded whenever it is used, and how often that is in a pass."""
    for size in plan.units:
        if size.decoded or size.rare or size.only_by_row:
            continue
        if size.routing is not None and size.name in partition.experts:
            yield partition.experts[size.name][0], size.routing.used
        else:
            yield partition.units[size.name], 1
