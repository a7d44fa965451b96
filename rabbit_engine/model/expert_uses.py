"""How often each expert was used, kept from one start to the next, which then begins with the most used ones in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rabbit_engine.planning.partition import Partition
from rabbit_engine.storage.cached import recall, remember
from rabbit_engine.streaming import ExpertCache

logger = logging.getLogger(__name__)

_KIND = "experts"


@dataclass(slots=True)
class ExpertUses:
    """The uses of the experts in `cache`, which belong to the files that `key` identifies."""

    key: str
    cache: ExpertCache
    _is_saved: bool = False

    def start(self) -> None:
        """Read the experts that earlier starts used most, as many as may be kept."""
        uses = _checked(recall(_KIND, self.key), {name: len(layer.units) for name, layer in self.cache.layers.items()})
        count = self.cache.warm(uses)
        if count:
            logger.info("%d experts that were used most before were read", count)

    def save(self) -> None:
        """Keep the uses for the next start, once, if any expert was used."""
        uses = self.cache.uses()
        if not self._is_saved and any(uses.values()):
            self._is_saved = True
            remember(_KIND, self.key, uses)


def uses_of(partition: Partition, cache: ExpertCache) -> ExpertUses:
    """The uses of a model's experts. The same files, unchanged, have the same."""
    units = (unit for layer in cache.layers for unit in partition.experts[layer])
    files = sorted({(str(extent.path), extent.stamp) for unit in units for extent in unit.extents})
    return ExpertUses(repr(files), cache)


def _checked(found: Any, counts: Mapping[str, int]) -> dict[str, dict[int, float]]:
    """What is usable of a recalled value: layers and experts that exist, with finite numbers."""
    layers = found if isinstance(found, dict) else {}
    return {name: _numbers(layers.get(name), count) for name, count in counts.items()}


def _numbers(found: Any, count: int) -> dict[int, float]:
    rows = found if isinstance(found, dict) else {}
    return {
        int(index): float(use)
        for index, use in rows.items()
        if index.isdecimal() and int(index) < count and isinstance(use, int | float) and math.isfinite(use) and use > 0
    }
