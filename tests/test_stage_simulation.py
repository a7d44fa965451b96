"""The simulator of stages against closed formulas, and against the sums of plans."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.planning.machines import Machine
from rabbit_engine.planning.stage_simulation import Failures, Station, simulate, simulate_plan, stations_of
from rabbit_engine.planning.stages import LayeredUnits, plan_stages, take_over
from rabbit_engine.planning.tiers import UnitSize


def station(machine: str, compute_s: float, **given: Any) -> Station:
    return Station(machine=machine, compute_s=compute_s, **given)


def test_one_stage_that_computes() -> None:
    found = simulate([station("a", 0.25)], tokens=40)
    assert (found.seconds, found.pass_s) == (pytest.approx(10), pytest.approx(0.25))
    assert found.computing == {"a": pytest.approx(1)}
    assert found.bubbles == pytest.approx(0)


@pytest.mark.parametrize(("compute_s", "read_s", "pass_s"), [(1.0, 3.0, 3.0), (3.0, 1.0, 3.0), (0.0, 2.0, 2.0)])
def test_one_stage_that_streams_takes_the_longer_of_reading_and_computing(compute_s: float, read_s: float, pass_s: float) -> None:
    found = simulate([station("a", compute_s, read_s=read_s, pieces=40)], tokens=40)
    assert found.pass_s == pytest.approx(pass_s, rel=0.01)
    assert found.reading["a"] == pytest.approx(read_s / pass_s, rel=0.02)


def test_one_text_takes_the_sum_of_the_stages_and_many_the_longest() -> None:
    stages = [station(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 1.0))]
    assert simulate(stages, 1).pass_s == pytest.approx(4)
    assert simulate(stages, 2).pass_s == pytest.approx(4)  # two fill two of the four seconds of the longest
    assert simulate(stages, 8, tokens=40).pass_s == pytest.approx(8 * 2)
    assert simulate(stages, 8, tokens=40).bubbles == pytest.approx(1 / 3, abs=0.02)  # a and c compute half of the time


def test_links_add_two_messages_a_stage_and_bound_many_texts() -> None:
    remote = {"wire_s": 0.3, "driver_wire_s": 0.3, "latency_s": 0.1}
    stages = [station("a", 0.01), *(station(name, 0.01, **remote) for name in "bc")]
    assert simulate(stages, 1).pass_s == pytest.approx(0.03 + 2 * 2 * 0.4)
    found = simulate(stages, 10, tokens=40)
    assert found.pass_s == pytest.approx(10 * 2 * 0.3, rel=0.02)  # the driver sends two messages for each
    assert found.sending["a"] == pytest.approx(1, abs=0.03)


def test_a_driver_may_hold_no_layers() -> None:
    remote = {"wire_s": 0.3, "driver_wire_s": 0.3}
    stages = [station("b", 0.1, **remote), station("c", 0.1, **remote), station("a", 0.1)]
    assert simulate(stages, 10, tokens=40, driver="a").sending["a"] == pytest.approx(1, abs=0.03)


def test_experts_that_are_missing_are_read_by_nobody_ahead() -> None:
    stages = [station("a", 5.0), station("b", 1.0, asked_s=2.0)]
    assert simulate(stages).pass_s == pytest.approx(8)
    assert simulate(stages).reading["b"] == pytest.approx(2 / 8)


def test_a_ring_is_read_ahead_while_others_compute() -> None:
    """Four of sixteen pieces are there when the turn comes."""
    stages = [station("a", 5.0), station("b", 0.0, read_s=4.0, pieces=16, slots=4)]
    assert simulate(stages).pass_s == pytest.approx(5 + 3, rel=0.01)
    short = [station("a", 0.5), station("b", 0.0, read_s=4.0, pieces=16, slots=4)]
    assert simulate(short).pass_s == pytest.approx(4, rel=0.01)  # the disk never rests


def test_stages_in_turns_read_at_once() -> None:
    turns = [station(name, 0.0, read_s=1.0, pieces=4, slots=4) for _ in range(4) for name in "ab"]
    ranges = [station(name, 0.0, read_s=4.0, pieces=16, slots=4) for name in "ab"]
    assert simulate(turns, tokens=40).pass_s == pytest.approx(4, rel=0.02)
    assert simulate(ranges, tokens=40).pass_s == pytest.approx(6, rel=0.02)


def test_a_failure_costs_the_recovery_and_the_pass_over_all_tokens() -> None:
    stages = [station("a", 0.0), station("b", 1.0, further_row=0.5)]
    plain = simulate(stages, tokens=10)
    tried = [Failures(every_s=10, recovery_s=7, seed=seed) for seed in range(20)]
    failed = next(found for found in (simulate(stages, tokens=10, failures=one) for one in tried) if found.failures == 1)
    assert failed.replays == 1
    lost = failed.seconds - plain.seconds - 7
    rows = [0.5 * tokens + part for tokens in range(10) for part in (0.0, 1.0)]  # further rows, and the pass that was under way
    assert min(rows) <= lost <= max(rows)


def test_failures_come_as_often_as_said_and_the_same_for_a_seed() -> None:
    stages = [station(name, 0.1, further_row=0.0) for name in "abc"]
    failures = Failures(every_s=80, recovery_s=1, seed=3)
    found = simulate(stages, 2, tokens=4_000, failures=failures)
    assert found.failures == pytest.approx(2 * found.seconds / 80, rel=0.25)
    assert found == simulate(stages, 2, tokens=4_000, failures=failures)
    assert found != simulate(stages, 2, tokens=4_000, failures=Failures(every_s=80, recovery_s=1, seed=4))
    assert simulate(stages[:1], failures=failures).failures == 0  # the driver's failure is not simulated


def test_texts_that_fail_more_often_than_they_can_be_computed_again_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match="10000 failures"):
        simulate([station("a", 1.0), station("b", 1.0)], tokens=100, failures=Failures(every_s=1, recovery_s=1))


@st.composite
def models(draw: st.DrawFn) -> tuple[LayeredUnits, list[Machine]]:
    layers = draw(st.integers(4, 24))
    matrices = tuple(tuple(UnitSize(f"{index}.{part}", "streamed", 25) for part in range(4)) for index in range(layers))
    units = LayeredUnits(layers=matrices, ends=(UnitSize("norm", "resident", 1),), hidden_bytes=10)
    machine = st.builds(
        Machine,
        name=st.just("x"),
        memory_bytes=st.integers(120, 1500),
        disk_rate=st.sampled_from([50.0, 100.0]),
        seconds_per_byte=st.sampled_from([0.0, 0.001, 0.02]),
        further_text=st.sampled_from([0.1, 1.0]),
        link_rate=st.sampled_from([100.0, 10_000.0]),
        link_latency_s=st.sampled_from([0.0, 0.1]),
    )
    kind = draw(machine)
    count = draw(st.integers(1, 4))
    machines = [Machine(**{**{field: getattr(kind, field) for field in kind.__slots__}, "name": name}) for name in "abcd"[:count]]
    return units, machines


@settings(max_examples=40, deadline=None)
@given(given=models(), texts=st.integers(1, 6), most_rounds=st.sampled_from([1, 4]))
def test_what_a_plan_adds_up_is_what_happens(given: tuple[LayeredUnits, list[Machine]], texts: int, most_rounds: int) -> None:
    units, machines = given
    plan = plan_stages(units, machines, texts=texts, most_rounds=most_rounds)
    assert simulate_plan(plan, texts, tokens=24).pass_s == pytest.approx(plan.seconds(texts), rel=0.25, abs=1e-6)


def test_machines_that_share_processors_compute_no_faster_together() -> None:
    units = LayeredUnits(
        layers=tuple((UnitSize(f"l{index}", "streamed", 100),) for index in range(8)),
        ends=(UnitSize("norm", "resident", 1),),
        hidden_bytes=10,
    )
    machines = [Machine(name=name, memory_bytes=450, seconds_per_byte=0.01, processors="here") for name in "abcd"]
    plan = plan_stages(units, machines, texts=8)
    for texts in (1, 8):
        assert simulate_plan(plan, texts, tokens=40).pass_s == pytest.approx(plan.seconds(texts), rel=0.15)
    assert plan.seconds(8) >= 8 * plan.seconds(1) * (1 - 1e-9)


def test_devices_that_share_a_disk_have_parts_of_its_rate() -> None:
    units = LayeredUnits(
        layers=tuple((UnitSize(f"l{index}", "streamed", 100),) for index in range(8)),
        ends=(UnitSize("norm", "resident", 1),),
        hidden_bytes=10,
    )
    devices = [Machine(name=name, memory_bytes=301, disk_rate=100.0, seconds_per_byte=0.0, disk="sda") for name in "ab"]
    plan = plan_stages(units, devices)
    assert [one.read_s for one in stations_of(plan)[:2]] == [6.0, 6.0]
    assert simulate_plan(plan).pass_s == pytest.approx(plan.pass_s, rel=0.4)
    left = take_over(plan_stages(units, [*devices, Machine(name="c", memory_bytes=2000, disk_rate=100.0)]), "b")
    assert len(stations_of(left)) == len(left.stages) + 1
