"""What a plan says of the seconds of a pass before one ran."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from rabbit_engine.planning.experts import NO_EXPERTS, Routing
from rabbit_engine.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Prior:
    """A pass moves weights for `shared_s` whatever its rows, and for `experts_s` those that one row uses of experts on demand.

    Of `count` experts a layer, a row uses `used`; the rows of a pass share those that they have in common.
    """

    shared_s: float
    experts_s: float = 0.0
    count: int = 1
    used: int = 1

    def seconds(self, rows: float) -> float:
        """Of a pass over that many rows, if it waits for weights only.

        Rows choose experts independently here: n rows use count * (1 - (1 - used / count) ** n) of them.
        """
        different = self.count * (1 - math.pow(1 - self.used / self.count, rows))
        return self.shared_s + self.experts_s * different / self.used

    @classmethod
    def of(cls, plan: Plan) -> Self | None:
        """That of a plan; None if no weight moves in a pass: then what limits it must be measured."""
        whole = plan.pass_s
        if not whole:
            return None
        shared = min(whole, replace(plan, experts=NO_EXPERTS).pass_s)
        routing = max((layer.routing for layer in plan.experts.layers), key=_share_used, default=None)
        if routing is None:
            return cls(shared)
        return cls(shared, whole - shared, routing.count, routing.used)


def _share_used(routing: Routing) -> float:
    return routing.used / routing.count
