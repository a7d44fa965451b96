"""The benchmark of peers: which lanes it has, which it runs again, and what its table says of those that failed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_peers
from peers.lanes import Lane, Limits, Run
from peers.report import as_markdown

LIMITS = Limits(memory_bytes=10**9, timeout_s=120.0, cold=())
OUTCOMES = {"ok": None, "timed out": "after 120 s", "killed": "out of memory"}


def lane(name: str) -> Lane:
    return Lane(name=name, module="none", python="none", model=Path("none"))


def run(name: str, outcome: str, phase: str = "round 1", token_s: float = 0.5) -> Run:
    figures = {"token_s": [token_s], "tokens": [7], "first_token_s": 1.0, "load_s": 2.0, "read_bytes": 0, "peak_rss_bytes": 0}
    error = OUTCOMES.get(outcome, "AssertionError: Torch not compiled with CUDA enabled")
    return Run(lane=name, settings=(), phase=phase, outcome=outcome, error=error, wall_s=3.0, figures=figures)


def row_of(name: str, runs: list[Run]) -> list[str]:
    found = next(line for line in as_markdown([name], runs).splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs three rounds of lanes whose processes end as given, by name and round: which ran, in order."""

    def measured(**ends: list[str]) -> list[str]:
        ran: list[str] = []

        def run_lane(one: Lane, _settings: object, phase: str, *_: object) -> Run:
            ran.append(f"{one.name} {phase.removeprefix('round ')}")
            return run(one.name, ends[one.name][int(phase[-1]) - 1], phase)

        monkeypatch.setattr(benchmark_peers, "run_lane", run_lane)
        benchmark_peers.measure([lane(name) for name in ends], 3, (), LIMITS)
        return ran

    return measured


def test_a_lane_that_does_not_survive_its_first_round_is_not_run_again(outcomes: Callable[..., list[str]]) -> None:
    assert outcomes(slow=["timed out"], good=["ok"] * 3) == ["slow 1", "good 1", "good 2", "good 3"]


def test_a_lane_that_survived_its_first_round_runs_in_every_round(outcomes: Callable[..., list[str]]) -> None:
    assert outcomes(unlucky=["ok", "killed", "ok"]) == ["unlucky 1", "unlucky 2", "unlucky 3"]


@pytest.mark.parametrize(("outcome", "phase", "told"), [
    ("timed out", "round 1", "1 of 1 runs timed out after 120 s"),
    ("killed", "round 1", "1 of 1 runs killed: out of memory"),
    ("failed", "prepare", "1 of 1 runs failed: AssertionError: Torch not compiled with CUDA enabled"),
])  # fmt: skip
def test_the_table_says_what_became_of_a_lane_without_survivors(outcome: str, phase: str, told: str) -> None:
    assert row_of("slow", [run("slow", outcome, phase)])[1:3] == ["-", told]


def test_the_median_is_that_of_the_rounds_survived() -> None:
    rounds = [run("good", "ok", "round 1", 0.25), run("good", "killed", "round 2"), run("good", "ok", "round 3", 0.75)]
    assert row_of("good", rounds)[1:3] == ["0.50", "0.25, killed, 0.75"]


def test_a_gguf_file_has_a_decoded_and_a_fused_lane() -> None:
    found = list(benchmark_peers.rabbit_lanes("python", Path("m"), [], [], [Path("x.gguf")], Path("s")))
    assert {one.name: one.always for one in found if one.model.suffix} == {
        "rabbit_engine, x.gguf in place": (),
        "rabbit_engine, x.gguf in place, fused": ("--fused-products",),
    }


def test_airllm_has_a_four_bit_lane_where_four_bits_are_compared() -> None:
    found = list(benchmark_peers.airllm_lanes("python", Path("m"), ["4bit", "8bit"], Path("s")))
    assert [one.name for one in found] == ["AirLLM", "AirLLM 4bit"]
    assert found[1].always[-2:] == ("--compression", "4bit")
