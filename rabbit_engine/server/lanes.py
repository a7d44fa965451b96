"""Records the activity of disk, copies and computation while a client polls."""

from __future__ import annotations

import threading
import time

from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.sessions import Session

MOST_SECONDS = 60.0
"""Older spans are dropped."""

_GAP_S = 0.002
_IDLE_S = 15.0
"""Recording stops when no client has polled for this long."""


class Lanes:
    """The live lanes of a model."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._trace = runtime_of(session.model).trace
        self._own = not self._trace.on  # a trace that was already on belongs to the caller
        self._lock = threading.Lock()
        self._looked_s = 0.0
        self._lanes: dict[str, list[list[float]]] = {}
        self._seen_s = 0.0
        self._timer: threading.Timer | None = None

    def show(self, seconds: float) -> dict[str, object]:
        """The last seconds: for each lane its busy spans, [start, end, bytes, busy seconds], in the trace's clock."""
        self._look()
        now = self._trace.now_s
        lanes = {lane: [span for span in spans if span[1] > now - seconds] for lane, spans in self._catch_up(now).items()}
        profile = self._session.model.profile
        return {
            "now_s": round(now, 4),
            "lanes": [{"lane": lane, "spans": spans} for lane, spans in sorted(lanes.items())],
            "progress": self._progress(),
            "running": self._session.running,
            "waiting": self._session.waiting,
            "passes": profile.passes,
            "pass_s": profile.pass_s,
            "bytes_read": profile.bytes_read,
        }

    def stop(self) -> None:
        """Stop recording."""
        with self._lock:
            self._stop()

    def _catch_up(self, now: float) -> dict[str, list[list[float]]]:
        """Add new spans, merging those with tiny gaps: a plot cannot show them apart."""
        with self._lock:
            for span in self._trace.since(self._seen_s):
                spans = self._lanes.setdefault(span.lane, [])
                if spans and span.start_s - spans[-1][1] < _GAP_S:
                    spans[-1][1] = round(max(spans[-1][1], span.end_s), 4)
                    spans[-1][2] += span.nbytes
                    spans[-1][3] += span.end_s - span.start_s
                else:
                    spans.append([round(span.start_s, 4), round(span.end_s, 4), span.nbytes, span.end_s - span.start_s])
                self._seen_s = max(self._seen_s, span.end_s)
            for spans in self._lanes.values():
                while spans and spans[0][1] < now - MOST_SECONDS:
                    spans.pop(0)
            return {lane: [list(span) for span in spans] for lane, spans in self._lanes.items()}

    def _progress(self) -> dict[str, object] | None:
        found = self._session.progress
        if found is None:
            return None
        named = {"layer": found.layer, "layers": found.layers, "bytes_read": found.bytes_read, "elapsed_s": found.elapsed_s}
        return {**named, "remaining_s": found.remaining_s, "text": str(found)}

    def _look(self) -> None:
        with self._lock:
            self._looked_s = time.monotonic()
            if self._own and not self._trace.on:
                self._trace.start(self._session.model.device)
                self._wait()

    def _wait(self) -> None:
        self._timer = threading.Timer(_IDLE_S, self._end_if_idle)
        self._timer.daemon = True
        self._timer.start()

    def _end_if_idle(self) -> None:
        with self._lock:
            if time.monotonic() - self._looked_s >= _IDLE_S:
                self._stop()
            elif self._timer is not None:
                self._wait()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._own:
            self._trace.stop()
        self._lanes.clear()
