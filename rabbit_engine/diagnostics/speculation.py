"""Decoding with and without speculation: seconds a token, tokens a pass, and whether the text is the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rabbit_engine.decoding import Draft
from rabbit_engine.diagnostics.benchmark import DECODE, BenchmarkRow, tracing
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model import AutoModel, StreamedModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.plan import Plan
from rabbit_engine.streaming import Span, SpeculationProfile
from rabbit_engine.utils.platform import environment

PROMPT = (
    "Write a Python class for a bank account with deposits, withdrawals and a history of both, and then a short example that "
    "uses each of its methods."
)
TOKENS = 48
_WARM_UP = 8
"""Tokens before the clock starts: they teach the order of reads, and try out whether several tokens a pass are right."""

Encode = Callable[[StreamedModel], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class SpeculationComparison:
    """Both lanes, the plan of the model that speculates, its profile and a trace of its last round.

    `same_tokens` is the number of tokens before the answers of both differ, or None if they are the same.
    """

    records: tuple[BenchmarkRow, BenchmarkRow]
    plan: Plan
    profile: SpeculationProfile
    spans: list[Span]
    same_tokens: int | None


def compare(
    name: str | Path, speculate: Draft | str, encode: Encode, rounds: int, tokens: int = TOKENS, **keywords: Any
) -> SpeculationComparison:
    """Time greedy answers of up to `tokens` to the prompt of `encode`, one token a pass and then with `speculate`.

    The model is loaded for each, so that plain decoding has the memory that a draft takes. Seconds are those after the first
    token. Raises ConfigurationError for an answer of one token, and what loading raises.
    """
    with AutoModel.from_pretrained(name, **keywords) as model:
        plain = _measured(model, encode, rounds, tokens)
    with AutoModel.from_pretrained(name, speculate=speculate, profiling_mode=True, **keywords) as model:
        runtime_of(model).trace.on = False
        found = _measured(model, encode, rounds, tokens)
        with tracing(runtime_of(model).trace):
            model.generate(**encode(model), max_new_tokens=_WARM_UP, do_sample=False)
        conditions = {
            "model": str(name),
            "what": f"a token after the first of a greedy answer of {len(plain.answer)} to {plain.prompt_tokens}",
            "threads": torch.get_num_threads(),
            **environment(),
        }
        lane = f"{DECODE} with {getattr(speculate, 'name', speculate)}"
        records = (plain.record(DECODE, conditions), found.record(lane, {**conditions, "speculation": asdict(found.profile)}))
        spans, differ = runtime_of(model).trace.spans(), _first_difference(plain.answer, found.answer)
        return SpeculationComparison(records, model.plan, found.profile, spans, differ)


@dataclass(slots=True)
class _Measured:
    """Seconds and CPU seconds a token of each round, bytes a token and the profile of all, and the answer."""

    prompt_tokens: int
    answer: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    bytes_a_token: int = 0
    profile: SpeculationProfile = field(default_factory=SpeculationProfile)

    def record(self, lane: str, conditions: Mapping[str, Any]) -> BenchmarkRow:
        return BenchmarkRow(lane, tuple(self.seconds), self.bytes_a_token, conditions, tuple(self.cpu_s))


class _Clock:
    """A streamer that notes when the first token of an answer comes."""

    def __init__(self) -> None:
        self._given = 0
        self.since = self.cpu_since = 0.0

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 - its name is transformers' own
        self._given += 1
        if self._given == 2:  # the prompt is the first
            self.since, self.cpu_since = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Nothing is left to do."""


def _measured(model: StreamedModel, encode: Encode, rounds: int, tokens: int) -> _Measured:
    inputs = encode(model)
    found = _Measured(inputs["input_ids"].shape[1])
    model.generate(**inputs, max_new_tokens=_WARM_UP, do_sample=False)
    runtime_of(model).transfer.wait_until_idle()
    before = model.profile
    for _ in range(rounds):
        clock = _Clock()
        ids: Any = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=clock)
        seconds, cpu_s = time.perf_counter() - clock.since, time.process_time() - clock.cpu_since
        found.answer = ids[0, found.prompt_tokens :].tolist()
        if len(found.answer) < 2:
            raise ConfigurationError("the model's answer ends after one token: give another prompt")
        found.seconds.append(seconds / (len(found.answer) - 1))
        found.cpu_s.append(cpu_s / (len(found.answer) - 1))
    runtime_of(model).transfer.wait_until_idle()
    found.bytes_a_token = (model.profile.bytes_read - before.bytes_read) // (rounds * len(found.answer))
    found.profile = model.profile.speculation.since(before.speculation)
    return found


def _first_difference(first: list[int], second: list[int]) -> int | None:
    if first == second:
        return None
    pairs = zip(first, second, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
