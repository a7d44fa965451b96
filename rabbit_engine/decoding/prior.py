"""What a plan says of the seconds of a pass before one ran."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from rabbit_engine.planning.experts import NO_EXPERTS, Routing
from rabbit_engine.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Prior:
    """A pass moves weights for `shared_s` whatever its rows, and for `experts_s` those that one row uses of experts on demand.

    Of `count` experts a layer, a row uses `used`; the rows of a pass share those that they have in common. Without `trusted`,
    seconds mean nothing on their own, but tell how much longer more rows take.
    """

    shared_s: float
    experts_s: float = 0.0
    count: int = 1
    used: int = 1
    trusted: bool = True

    def seconds(self, rows: float) -> float:
        """Of a pass over that many rows, if it waits for weights only.

        Rows choose experts independently here: n rows use count * (1 - (1 - used / count) ** n) of them.
        """
        different = self.count * (1 - math.pow(1 - self.used / self.count, rows))
        return self.shared_s + self.experts_s * different / self.used

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """That of a plan. If no weight moves in a pass, only the memory that its rows read is known."""
        on_demand = [layer.routing for layer in plan.experts.layers]
        if plan.pass_s:
            shared_s = min(plan.pass_s, replace(plan, experts=NO_EXPERTS).pass_s)
            return cls(shared_s, plan.pass_s - shared_s, *_most_selective(on_demand))
        routed = [unit for unit in plan.units if unit.routing is not None]
        used = sum(unit.routing.used * unit.routing.nbytes for unit in routed if unit.routing is not None)
        shared = plan.weights_bytes - sum(unit.nbytes for unit in routed)
        return cls(shared, used, *_most_selective(unit.routing for unit in routed if unit.routing), trusted=False)


def _most_selective(routings: Iterable[Routing]) -> tuple[int, int]:
    """(count, used) of the layer that uses the smallest part of its experts; (1, 1) if there are none."""
    return min(((routing.count, routing.used) for routing in routings), key=lambda pair: pair[1] / pair[0], default=(1, 1))
