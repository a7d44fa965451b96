"""Which texts of a pass have come to a stage, and whether others are expected."""

from __future__ import annotations

from rabbit_engine.streaming.stages.stage import StageRequest


class Arrivals:
    """Counts the requests of each pass that several texts share, by the layer that they begin with."""

    def __init__(self) -> None:
        self._came: dict[tuple[str, int], tuple[int, int]] = {}
        """By scheduler and layer: the pass, and how many requests of it have come."""
        self._lacking: dict[tuple[str, int], int] = {}
        """How many more are expected of those that now wait."""

    def note(self, request: StageRequest | None) -> None:
        """Count a request that came."""
        if request is None or request.shared is None or not request.layers:
            return
        shared, key = request.shared, (request.shared.scheduler, request.layers[0])
        number, came = self._came.get(key, (shared.number, 0))
        self._came[key] = shared.number, came + 1 if number == shared.number else 1
        self._lacking[key] = shared.texts - self._came[key][1]

    @property
    def are_lacking(self) -> bool:
        """Whether others are expected that would share a pass with those that wait."""
        return any(count > 0 for count in self._lacking.values())

    def go(self) -> None:
        """Those that wait do so no longer; what comes of their pass later is counted with them."""
        for key, lacking in self._lacking.items():
            if lacking <= 0:
                del self._came[key]
        self._lacking.clear()
