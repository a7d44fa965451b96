"""Measures where the seconds of a pass go: attention itself, waiting for weights, everything else.

"Attention" is the function that transformers calls between the projections, and nothing else: no projections, no rotary
embedding, no cache, no masks. On a GPU it is the time between two events around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rabbit_engine.model import StreamedModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.streaming import Span, Trace
from rabbit_engine.streaming.telemetry.trace import busy_seconds
from rabbit_engine.transformers_bridge.attention import AttentionFunction, wrapped_attention


@dataclass(frozen=True, slots=True)
class PassSample:
    """Seconds of one pass: in total, in attention (0 if the class does not call transformers' functions), waiting for weights
    (in this thread, not on a GPU), with a read or a copy of weights under way; and the bytes read."""

    pass_s: float
    attention_s: float
    wait_s: float
    moving_s: float
    read_bytes: int


@contextmanager
def traced_attention(trace: Trace, device: torch.device) -> Iterator[None]:
    """Record every call of an attention function, of any model, as a span."""

    def traced(name: str, function: AttentionFunction) -> AttentionFunction:
        @functools.wraps(function)
        def attention(*args: object, **kwargs: object) -> Any:
            with trace.device_span("attention", name, device):
                return function(*args, **kwargs)

        return attention

    with wrapped_attention(traced):
        yield


def sample_passes(model: StreamedModel, step: Callable[[], None], passes: int) -> PassSample:
    """Run `step`, a pass of a model loaded with `profiling_mode=True`, `passes` times; returns the mean of one.

    Recording costs a few microseconds a layer.
    """
    trace = runtime_of(model).trace
    trace.clear()
    trace.on = True
    try:
        with traced_attention(trace, runtime_of(model).device), trace.span("pass", "all"):
            for _ in range(passes):
                step()
    finally:
        trace.on = False
    return one_pass(trace.spans(), passes)


def one_pass(spans: Sequence[Span], passes: int) -> PassSample:
    """The mean seconds and bytes of a pass in a trace of `passes` passes, enclosed by one span of the lane "pass"."""
    whole = next(span for span in spans if span.lane == "pass")

    def seconds(*lanes: str) -> float:
        own = [span for span in spans if span.lane.split()[0] in lanes]
        return busy_seconds(own, whole.start_s, whole.end_s) / passes

    read = sum(span.nbytes for span in spans if span.lane.startswith("disk"))
    return PassSample(seconds("pass"), seconds("attention"), seconds("wait"), seconds("disk", "copy"), read // passes)
