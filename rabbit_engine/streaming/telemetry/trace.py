"""Records when each lane (disk, copy, wait, compute, draft) was busy, while `on`: spans in seconds of one clock."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rabbit_engine.utils.platform import has_streams

MOST_SPANS = 200_000
"""The most spans kept, about 30 MB; older ones are dropped."""


MOST_RECENT = 20_000
"""The most spans that `since` returns."""


@dataclass(frozen=True, slots=True)
class Span:
    """One action of a lane, from `start_s` to `end_s` since the trace began; it moved `nbytes`."""

    lane: str
    name: str
    start_s: float
    end_s: float
    nbytes: int = 0


class Trace:
    """The spans of all lanes. When off, it costs one flag test."""

    def __init__(self, *, on: bool = False, device: torch.device | None = None) -> None:
        self.on = on
        self._origin = time.perf_counter()
        self._device_origin: torch.Event | None = None
        self._spans: deque[tuple[str, str, Any, Any, int]] = deque(maxlen=MOST_SPANS)
        self._lock = threading.Lock()
        if on:
            self.start(device)

    def start(self, device: torch.device | None = None) -> None:
        """Start recording. Reads the clock of a device with streams once, together with the host's."""
        if device is not None and has_streams(device) and self._device_origin is None:
            torch.accelerator.synchronize(device)
            self._device_origin = _device_mark(torch.accelerator.current_stream(device))
            torch.accelerator.synchronize(device)
            self._origin = time.perf_counter()
            self.clear()
        self.on = True

    def stop(self) -> None:
        """Stop recording, and drop what was recorded."""
        self.on = False
        self.clear()

    @property
    def now_s(self) -> float:
        """Seconds since the trace began."""
        return time.perf_counter() - self._origin

    def since(self, mark_s: float) -> list[Span]:
        """Spans that ended after `mark_s`, at most the newest MOST_RECENT, by end. Its cost is that of the new ones only."""
        found = []
        with self._lock:
            newest = list(itertools.takewhile(lambda span: self._is_after(span[3], mark_s), reversed(self._spans)))[:MOST_RECENT]
        for lane, name, start, end, nbytes in reversed(newest):
            found.append(Span(lane, name, self._seconds(start), self._seconds(end), nbytes))
        return found

    def _is_after(self, mark: Any, mark_s: float) -> bool:
        """Whether a reading is later; a mark that the device has not reached yet is."""
        if not isinstance(mark, float) and not mark.query():
            return True
        return self._seconds(mark) > mark_s

    @contextmanager
    def span(self, lane: str, name: str, nbytes: int = 0) -> Iterator[None]:
        """Record the time of the block on this thread's clock."""
        if not self.on:
            yield
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, start, time.perf_counter(), nbytes)

    @contextmanager
    def device_span(self, lane: str, name: str, device: torch.device, nbytes: int = 0, stream: Any = None) -> Iterator[None]:
        """Record the time of the block on the device, between two events of `stream` or else its current one, if it has
        streams."""
        if not self.on or not has_streams(device):
            with self.span(lane, name, nbytes):
                yield
            return
        stream = stream or torch.accelerator.current_stream(device)
        begin = _device_mark(stream)
        yield
        self.add(lane, name, begin, _device_mark(stream), nbytes)

    def add(self, lane: str, name: str, start: object, end: object, nbytes: int = 0) -> None:
        """Add a span between two readings of `time.perf_counter`, or two timing events of the device."""
        if self.on:
            with self._lock:
                self._spans.append((lane, name, start, end, nbytes))

    def clear(self) -> None:
        """Drop what was recorded."""
        with self._lock:
            self._spans.clear()

    def spans(self) -> list[Span]:
        """The recorded spans, in the order of their starts. Waits for the device if it recorded any."""
        with self._lock:
            found = list(self._spans)
        return sorted(
            (Span(lane, name, self._seconds(start), self._seconds(end), nbytes) for lane, name, start, end, nbytes in found),
            key=lambda span: span.start_s,
        )

    def _seconds(self, mark: Any) -> float:
        if isinstance(mark, float):
            return mark - self._origin
        mark.synchronize()
        return float(self._device_origin.elapsed_time(mark)) / 1000  # type: ignore[union-attr]


def _device_mark(stream: torch.Stream) -> torch.Event:
    event = torch.Event(stream.device, enable_timing=True)
    event.record(stream)
    return event


def busy_seconds(spans: Iterable[Span], start_s: float, end_s: float) -> float:
    """Seconds between `start_s` and `end_s` in which at least one of `spans` was under way."""
    busy, position = 0.0, start_s
    for span in sorted(spans, key=lambda span: span.start_s):
        begin, end = max(span.start_s, position), min(span.end_s, end_s)
        if end > begin:
            busy += end - begin
            position = end
    return busy


def busy_share(spans: Sequence[Span], lane: str) -> float:
    """The fraction of a trace's time in which a lane (`"disk"` counts all its readers) was busy; 0 for an empty trace."""
    own = [span for span in spans if span.lane.split()[0] == lane]
    if not own:
        return 0.0
    start, end = min(span.start_s for span in spans), max(span.end_s for span in spans)
    return busy_seconds(own, start, end) / (end - start) if end > start else 0.0


def write_chrome_trace(spans: Sequence[Span], path: Path) -> None:
    """Write spans in the Trace Event Format that Perfetto and chrome://tracing read: one row a lane, microseconds."""
    lanes = sorted({span.lane for span in spans})
    names = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": index, "args": {"name": lane}} for index, lane in enumerate(lanes)
    ]
    events = [
        {
            "name": span.name,
            "cat": span.lane.split()[0],
            "ph": "X",
            "pid": 1,
            "tid": lanes.index(span.lane),
            "ts": span.start_s * 1e6,
            "dur": (span.end_s - span.start_s) * 1e6,
            "args": {"bytes": span.nbytes},
        }
        for span in spans
    ]
    path.write_text(json.dumps({"traceEvents": [*names, *events], "displayTimeUnit": "ms"}))
