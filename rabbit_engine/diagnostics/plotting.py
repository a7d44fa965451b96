"""Draws a trace: one row per lane, one bar per span. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rabbit_engine.streaming import Span, busy_share
from rabbit_engine.utils.extras import missing_extra

_COLOURS = {"disk": "#2f6fab", "copy": "#d98b2b", "compute": "#3a9a5b", "draft": "#7d5ba6", "wait": "#c0392b"}


def require_matplotlib() -> None:
    """Raises MissingExtraError; call it before measuring what is to be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_extra("a plot", "plot", error) from error


def plot_trace(spans: Sequence[Span], path: Path, title: str = "") -> None:
    """Draw `spans` to `path` (the suffix selects the format). Raises MissingExtraError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    lanes = sorted({span.lane for span in spans}, key=lambda lane: (list(_COLOURS).index(lane.split()[0]), lane))
    origin = min((span.start_s for span in spans), default=0.0)
    figure = Figure(figsize=(14, 1 + 0.45 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    for row, lane in enumerate(lanes):
        bars = [(span.start_s - origin, span.end_s - span.start_s) for span in spans if span.lane == lane]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=_COLOURS[lane.split()[0]], edgecolor="none")
    axes.set_yticks(range(len(lanes)), labels=lanes)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    busy = ", ".join(f"{lane} {busy_share(spans, lane):.0%}" for lane in _COLOURS if any(s.lane.startswith(lane) for s in spans))
    axes.set_title(f"{title}  (busy: {busy})".strip())
    figure.savefig(path, dpi=120)
