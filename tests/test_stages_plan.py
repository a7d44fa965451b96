"""Stages of a model over machines: pure, so a table of cases, and all choices tried where there are few."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from rabbit_engine.errors import BudgetError, ConfigurationError
from rabbit_engine.planning.experts import Routing
from rabbit_engine.planning.machines import parse_machines, read_machines
from rabbit_engine.planning.partition import partition_model
from rabbit_engine.planning.stage_costs import different_experts
from rabbit_engine.planning.stages import LayeredUnits, Machine, StagesPlan, crowd, layered_units, plan_stages, take_over
from rabbit_engine.planning.stages_plan import row_of_stages
from rabbit_engine.planning.tiers import UnitSize
from rabbit_engine.planning.weights import unread_entries


def model(*sizes: int, head: int = 0, experts: int = 0, hidden_bytes: int = 10) -> LayeredUnits:
    """Layers of one unit each with those bytes, and of `experts`, of which a token uses two."""
    routing = Routing(experts, 2, 10, 10)
    layers = tuple(
        (
            UnitSize(f"l{index}", "streamed", size),
            *([UnitSize(f"e{index}", "experts", 10 * experts, routing=routing)] if experts else []),
        )
        for index, size in enumerate(sizes)
    )
    ends = (UnitSize("embed", "embedding", 300), UnitSize("norm", "resident", 1))
    return LayeredUnits(
        layers=layers, ends=(*ends, *([UnitSize("head", "streamed", head)] if head else [])), hidden_bytes=hidden_bytes
    )


def machine(name: str, memory: int, **given: Any) -> Machine:
    return Machine(name=name, memory_bytes=memory, **{"disk_rate": 100.0, "seconds_per_byte": 0.001, **given})


def ranges(plan: StagesPlan) -> list[tuple[str, int, int]]:
    return [(stage.machine.name, stage.first, stage.stop) for stage in plan.stages]


EIGHT = model(*[100] * 8)

# What is chosen.


def test_the_driver_takes_all_that_fits_it() -> None:
    plan = plan_stages(EIGHT, [machine("a", 2000), machine("b", 2000, link_latency_s=0.01)])
    assert ranges(plan) == [("a", 0, 8)]
    assert plan.pass_s == pytest.approx(0.001 * 801)
    assert plan.bound() == ("computing", "a")
    assert plan.max_memory == {"a": 1101}
    assert "no faster" in dict(plan.rows())["b"]


def test_memory_adds_up_and_nothing_is_read_from_disk() -> None:
    machines = [machine(name, 250, link_rate=1000.0, link_latency_s=0.01) for name in "abcd"]
    plan = plan_stages(EIGHT, machines)
    assert ranges(plan) == [("a", 0, 2), ("b", 2, 4), ("c", 4, 6), ("d", 6, 8)]
    assert (plan.pass_bytes, plan.resident_bytes) == (0, 801)
    assert plan.pass_s == pytest.approx(0.001 * 801 + 3 * 2 * (0.01 + 10 / 1000))
    alone = plan_stages(EIGHT, machines[:1])
    assert (alone.pass_bytes, alone.bound()) == (800, ("disk", "a"))
    assert alone.pass_s == pytest.approx(800 / 100)  # the ring of two hides no read: its disk never rests


def test_a_stage_reads_ahead_while_others_compute_what_its_ring_holds() -> None:
    """Both stream three layers: two were read during the other's turn, the third is read once the first has left room for it."""
    plan = plan_stages(EIGHT, [machine("a", 301, seconds_per_byte=0.004), machine("b", 300, seconds_per_byte=0.004)])
    assert [stage.streamed_bytes for stage in plan.stages] == [300, 300]
    assert [turn.ahead_s for turn in plan.turns()] == [2.0, 2.0, 0.0]
    # each layer computes for 0.4 s: the third streamed one, after one that stays, is asked for 0.8 s after the first, read in 1 s
    assert [turn.waiting_s for turn in plan.turns()] == pytest.approx([0.2, 0.2, 0])
    assert plan.pass_s == pytest.approx(0.004 * 801 + 2 * 0.2)
    assert plan.seconds(2, 1) == pytest.approx(2 * 0.004 * 801)  # two texts compute longer than that


def test_a_ring_with_room_for_little_more_than_a_unit_waits_for_most_of_its_reads() -> None:
    """Stages of layers that are all streamed: of each, two are read ahead."""
    units = model(*[100] * 12)
    machines = [machine("a", 201, seconds_per_byte=0.0), machine("b", 200, seconds_per_byte=0.0)]
    plan = row_of_stages(units, machines, [(0, range(3)), (1, range(3, 6)), (0, range(6, 9)), (1, range(9, 12))])
    assert plan.pass_s == pytest.approx(6.0)  # both disks always read
    slower = row_of_stages(units, [machine("a", 201), machine("b", 200)], [(0, range(6)), (1, range(6, 12))])
    assert [turn.waiting_s for turn in slower.turns()] == pytest.approx([3.6, 3.6, 0])  # 4 s, of which 0.1 s of computing each
    assert slower.pass_s == pytest.approx(0.001 * 1201 + 2 * 3.6)


def test_a_disk_is_never_busier_than_a_pass_is_long() -> None:
    own = plan_stages(EIGHT, [machine("a", 301), machine("b", 300)])
    assert (own.pass_s, own.bound()) == (pytest.approx(3.0), ("disk", "a"))
    shared = plan_stages(EIGHT, [machine("a", 301, disk="sda"), machine("b", 300, disk="sda")])
    assert (shared.pass_s, shared.bound()) == (pytest.approx(6.0), ("disk", "sda"))


def test_layers_go_where_they_are_read_fastest() -> None:
    plan = plan_stages(EIGHT, [machine("a", 201), machine("slow", 300, disk_rate=10.0), machine("fast", 300, disk_rate=1000.0)])
    held = {name: sum(stop - first for owner, first, stop in ranges(plan) if owner == name) for name in ("a", "slow", "fast")}
    assert held["slow"] == 3  # what stays there
    assert held["fast"] > held["a"]


def test_a_machine_without_a_disk_holds_what_fits() -> None:
    plan = plan_stages(EIGHT, [machine("a", 201), machine("b", 399, disk_rate=0.0)])
    assert ranges(plan) == [("a", 0, 5), ("b", 5, 8)]


def test_machines_that_take_turns_read_while_the_others_do() -> None:
    """Eight layers that stream, computed in no time: in turns both disks read all the time, in ranges one after the other."""
    units = model(*[100] * 16)
    machines = [machine("a", 201, seconds_per_byte=0.0), machine("b", 200, seconds_per_byte=0.0)]
    in_ranges, in_turns = plan_stages(units, machines), plan_stages(units, machines, most_rounds=8)
    assert in_ranges.pass_s == pytest.approx(12.0)  # 16 s of reading, two of them ahead on each
    assert in_turns.pass_s == pytest.approx(8.0)
    assert {stage.machine.name for stage in in_turns.stages[:2]} == {"a", "b"}
    assert [layer for stage in in_turns.stages for layer in stage.layers] == list(range(16))


def test_machines_that_share_processors_compute_no_faster_together() -> None:
    """Four nodes on two cores, of which each takes both, or one."""
    units, texts = model(*[100] * 8), 8
    own = [Machine(name=name, memory_bytes=1000, seconds_per_byte=0.01) for name in "abcd"]
    alone = plan_stages(units, own, texts=texts)
    computing = sum(turn.compute_s for turn in alone.turns())
    shared = [replace(one, processors="here") for one in own]
    for machines, seconds in (
        (own, computing / 4),
        (shared, computing),
        ([replace(one, processors_share=0.5) for one in shared], computing / 2),
    ):
        plan = plan_stages(units, machines, texts=texts)
        assert plan.seconds(texts) >= seconds * texts * (1 - 1e-9)
        assert plan.seconds(texts) <= seconds * (texts + 4)
        assert plan.seconds(1) == pytest.approx(computing)
    plan = plan_stages(units, shared, texts=texts)
    assert plan.bound(texts) == ("computing", "a, b, c, d")


def test_turns_are_not_planned_where_they_save_nothing() -> None:
    units, fast = model(*[100] * 16), {"seconds_per_byte": 0.0}
    few = [machine("a", 201, **fast), machine("b", 200, **fast)]
    assert len(plan_stages(units, few, most_rounds=8).stages) > 2
    one_disk = [replace(one, disk="sda") for one in few]
    assert len(plan_stages(units, one_disk, most_rounds=8).stages) == 2  # it never rests in ranges either
    uneven = [machine("a", 901, seconds_per_byte=0.01), machine("b", 200, **fast)]
    assert len(plan_stages(units, uneven, most_rounds=8, several=1).stages) > 2
    one_disk = [replace(one, disk="sda") for one in uneven]
    assert len(plan_stages(units, one_disk, most_rounds=8, several=1).stages) == 2  # devices of one machine
    slow_links = [replace(one, link_latency_s=1.7) for one in few]
    assert len(plan_stages(units, slow_links, most_rounds=2).stages) == 2  # each turn is two messages
    ample = [machine("a", 1000, **fast), machine("b", 1000, **fast)]
    assert ranges(plan_stages(units, ample, most_rounds=8)) == ranges(plan_stages(units, ample))  # all stay in memory


def test_turns_are_not_planned_where_several_texts_lose() -> None:
    """Four texts compute on both machines at once in ranges, and one behind another in turns."""
    units = model(*[100] * 16)
    slow = [machine("a", 201, seconds_per_byte=0.003), machine("b", 200, seconds_per_byte=0.003)]
    for_one, for_many = (plan_stages(units, slow, most_rounds=8, several=several) for several in (1, 4))
    assert for_one.pass_s < for_many.pass_s
    assert for_many.seconds(4) < for_one.seconds(4)
    assert ranges(for_many) == ranges(plan_stages(units, slow))


def test_several_texts_fill_all_stages() -> None:
    """Everything stays: a text takes as long as ever, and all machines compute at once."""
    machines = [machine(name, 250) for name in "abcd"]
    plan = plan_stages(EIGHT, machines, texts=8)
    assert plan.pass_s == pytest.approx(0.801)
    assert plan.seconds(8) == pytest.approx(8 * 0.201)  # the driver's range and the norm
    assert plan.bound(8) == ("computing", "a")
    assert plan.seconds(8, 1) == pytest.approx(8 * 0.801)
    assert dict(plan.rows())["several"].startswith("8 texts in 4 groups")


def test_texts_that_share_products_or_a_link() -> None:
    shared = [machine(name, 250, further_text=0.0) for name in "abcd"]
    assert plan_stages(EIGHT, shared, texts=8).seconds(8) == pytest.approx(0.801)
    thin = [machine(name, 250, link_rate=100.0, disk_rate=0.0) for name in "abcd"]
    plan = plan_stages(replace(EIGHT, hidden_bytes=1000), thin, texts=8)
    assert plan.seconds(8) == pytest.approx(8 * 3 * 1000 / 100, rel=0.1)  # three messages each way over the driver's link
    assert plan.bound(8) == ("link", "a")


def test_experts_are_read_as_often_as_they_are_missing() -> None:
    units = model(100, 100, experts=8)
    assert plan_stages(units, [machine("a", 1000)]).pass_bytes == 0
    plan = plan_stages(units, [machine("a", 301)])
    cached = [layer.cached[0] for layer in plan.ends_plan.experts.layers]
    assert sum(cached) == 7  # of nine slots, two are for those in transit
    assert plan.pass_bytes == pytest.approx(sum(2 * 10 * (1 - one / 8) for one in cached), abs=1)
    assert plan.stages[0].work.asked_bytes(4) == pytest.approx(sum(8 * (1 - 0.75**4) * 10 * (1 - one / 8) for one in cached))
    assert different_experts(Routing(8, 2, 1, 1), 1) == pytest.approx(2)


def test_caches_of_texts_take_room() -> None:
    full = replace(EIGHT, cache_bytes=25)
    plan = plan_stages(full, [machine(name, 251) for name in "abcd"])
    assert ranges(plan) == [("a", 0, 2), ("b", 2, 4), ("c", 4, 6), ("d", 6, 8)]
    assert plan_stages(full, [machine(name, 249 + 51) for name in "abcd"], texts=1).pass_bytes == 0
    assert (
        plan_stages(replace(EIGHT, cache_bytes=26), [machine("a", 450)]).pass_bytes
        > plan_stages(EIGHT, [machine("a", 450)]).pass_bytes
    )


@st.composite
def clusters(draw: st.DrawFn) -> tuple[LayeredUnits, list[Machine], int]:
    units = model(*draw(st.lists(st.integers(1, 60), min_size=1, max_size=6)), head=draw(st.integers(0, 60)))
    kinds = st.builds(
        Machine,
        name=st.just("x"),
        memory_bytes=st.integers(60, 260),
        disk_rate=st.sampled_from([0.0, 10.0, 100.0]),
        seconds_per_byte=st.sampled_from([0.0, 0.001, 0.05]),
        further_text=st.sampled_from([0.1, 1.0]),
        link_latency_s=st.sampled_from([0.0, 0.3]),
    )
    machines = draw(st.lists(kinds, min_size=1, max_size=3))
    named = [replace(one, name=name) for one, name in zip(machines, "abc", strict=False)]
    return units, named, draw(st.integers(1, 4))


def all_cuts(layers: int, machines: int) -> Iterator[list[tuple[int, range]]]:
    for cuts in itertools.combinations_with_replacement(range(layers + 1), machines - 1):
        edges = [0, *cuts, layers]
        yield [(index, range(first, stop)) for index, (first, stop) in enumerate(itertools.pairwise(edges))]


@settings(max_examples=60, deadline=None)
@given(given=clusters())
def test_no_choice_of_ranges_is_better(given: tuple[LayeredUnits, list[Machine], int]) -> None:
    units, machines, texts = given
    best = None
    for order in itertools.permutations(machines[1:]):
        for cut in all_cuts(len(units.layers), len(machines)):
            with contextlib.suppress(BudgetError):
                seconds = row_of_stages(units, [machines[0], *order], cut).seconds(texts)
                best = seconds if best is None else min(best, seconds)
    if best is None:
        with pytest.raises(BudgetError):
            plan_stages(units, machines, texts=texts)
        return
    assert plan_stages(units, machines, texts=texts).seconds(texts) <= best * 1.02 + 1e-9


# What is missing.


def test_a_driver_without_room_for_what_it_keeps_is_named() -> None:
    with pytest.raises(BudgetError, match="a needs 81 B to stream its part of the model, and has 80 B: a is the first") as caught:
        plan_stages(model(10, head=80), [machine("a", 80), machine("b", 1000)])
    assert caught.value.smallest_bytes == 81


def test_machines_without_room_for_the_layers_say_what_is_missing() -> None:
    with pytest.raises(BudgetError, match=r"too few of the 8 layers even streamed \(a 0, b 1\): .*a needs 101 B"):
        plan_stages(EIGHT, [machine("a", 50), machine("b", 120)])


def test_machines_need_names() -> None:
    with pytest.raises(ConfigurationError, match="different names"):
        plan_stages(EIGHT, [machine("a", 50), machine("a", 120)])
    with pytest.raises(ConfigurationError, match="none"):
        plan_stages(EIGHT, [])


# A machine that is lost.


def test_an_orphaned_range_goes_where_it_costs_least() -> None:
    machines = [machine("a", 251), machine("b", 200), machine("slow", 600, seconds_per_byte=0.01), machine("fast", 450)]
    plan = row_of_stages(EIGHT, machines, [(0, range(2)), (1, range(2, 4)), (2, range(4, 6)), (3, range(6, 8))])
    found = take_over(plan, "b")
    assert ranges(found) == [("a", 0, 2), ("fast", 2, 4), ("slow", 4, 6), ("fast", 6, 8)]
    assert (found.pass_bytes, found.max_memory) == (0, {"a": 201, "slow": 200, "fast": 400})
    assert [machine.name for machine in found.machines] == ["a", "slow", "fast"]
    assert ranges(take_over(found, "fast")) == [("a", 0, 2), ("slow", 2, 4), ("slow", 4, 6), ("slow", 6, 8)]


def test_ranges_that_were_placed_together_go_together() -> None:
    """A process has all of a machine's ranges: they go to one machine, and share what it has left."""
    machines = [machine("a", 251), machine("b", 300), machine("c", 350), machine("d", 600)]
    dealt = [(0, range(1)), (1, range(1, 2)), (2, range(2, 3)), (1, range(3, 5)), (3, range(5, 6)), (2, range(6, 8))]
    plan = row_of_stages(EIGHT, machines, dealt)
    assert [(one.machine.name, one.layers) for one in plan.held] == [
        ("a", (0,)),
        ("b", (1, 3, 4)),
        ("c", (2, 6, 7)),
        ("d", (5,)),
    ]
    for leave in (take_over, crowd):
        found = leave(plan, "b")
        assert [(one.machine.name, one.layers) for one in found.held] == [
            ("a", (0,)),
            ("d", (1, 3, 4)),
            ("c", (2, 6, 7)),
            ("d", (5,)),
        ]
    assert found.max_memory["d"] <= 600
    with pytest.raises(BudgetError, match="left for layers 1, 3-4 of b"):
        take_over(replace(plan, machines=(*machines[:3], machine("d", 150))), "b")


def test_one_that_stays_is_better_than_one_that_streams() -> None:
    machines = [machine("a", 201), machine("b", 300), machine("small", 500), machine("large", 600)]
    plan = row_of_stages(EIGHT, machines, [(0, range(1)), (1, range(1, 4)), (2, range(4, 6)), (3, range(6, 8))])
    found = take_over(plan, "b")
    assert ranges(found)[1][0] in ("small", "large")
    tight = replace(plan, machines=(machines[0], machines[1], replace(machines[2], memory_bytes=420), machines[3]))
    assert ranges(take_over(tight, "b"))[1] == ("large", 1, 4)


def test_no_room_for_an_orphan_is_an_error_with_what_it_needs() -> None:
    machines = [machine("a", 201), machine("b", 300), machine("c", 399)]
    plan = row_of_stages(EIGHT, machines, [(0, range(2)), (1, range(2, 5)), (2, range(5, 8))])
    with pytest.raises(BudgetError, match="no machine has 200 B left for layers 2-4 of b") as caught:
        take_over(plan, "b")
    assert caught.value.smallest_bytes == 200
    with pytest.raises(BudgetError, match="a is the driver"):
        take_over(plan, "a")


# Where plans come from, and what they look like.


def test_the_units_of_a_real_model_are_sorted_by_layer() -> None:
    skeleton = tiny.llama(num_hidden_layers=11)
    entries, ties = unread_entries(skeleton)
    partition = partition_model(skeleton, entries, ties)
    units = layered_units(partition, cached_tokens=100)
    assert len(units.layers) == 11
    assert {unit.name for unit in units.ends} == {"model.embed_tokens", "lm_head", "model.norm", "resident"} & {
        unit.name for unit in partition.sizes
    }
    assert all(unit.name.startswith(f"model.layers.{index}") for index, layer in enumerate(units.layers) for unit in layer)
    assert sum(map(len, units.layers)) + len(units.ends) == len(partition.sizes)
    assert units.hidden_bytes == skeleton.config.hidden_size * skeleton.dtype.itemsize
    assert units.cache_bytes * 11 == pytest.approx(100 * partition.probe.cache_token_bytes, rel=0.01)


def test_a_plan_prints() -> None:
    machines = [machine(name, 2 * 10**9 + 301, disk_rate=1e9, seconds_per_byte=1e-10) for name in "ab"]
    plan = plan_stages(model(*[10**9] * 8), machines, texts=4)
    text = str(plan)
    assert "8.00 GB over 2 machines" in text
    assert "layers 0-" in text
    assert "bound by the disk" in text
    assert repr(plan).startswith("<StagesPlan of 8 layers: a layers 0-")
    assert "32 layers in 8 turns, the first 0" in repr(plan_stages(model(*[10**9] * 64), machines, most_rounds=8))


def test_machines_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "machines.json"
    listed = [
        {"name": "driver", "memory": "4GB"},
        {"name": "pc", "count": 2, "memory": "13GB", "disk_rate": "3GB/s", "compute_rate": "25GB/s", "link_latency_s": 0.001},
    ]
    file.write_text(json.dumps(listed))
    driver, first, second = read_machines(file)
    assert (driver.name, driver.memory_bytes) == ("driver", 4 * 10**9)
    assert (first.name, second.name, second.disk_rate, second.seconds_per_byte) == ("pc1", "pc2", 3e9, 1 / 25e9)


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ({}, "JSON list of objects"),
        ([], "JSON list of objects"),
        ([{"name": "a"}], "machine 'a': 'memory' is missing"),
        ([{"name": "a", "memory": "lots"}], "'lots' is not a size"),
        ([{"name": "a", "memory": "1GB", "compute_rate": "0"}], "machine 'a'"),
        ([{"name": "a", "memory": "1GB", "cores": 4}], "has no 'cores'"),
        ([{"name": "a", "memory": "1GB", "count": 0}], "count=0"),
        ([{"name": "", "memory": "1GB"}], "needs a name"),
        ([{"name": "a", "memory": "1GB", "link_latency_s": -1}], "link_latency_s"),
        ([{"name": "a", "memory": "1GB"}] * 2, "several machines are named a"),
    ],
)
def test_what_describes_no_machines_is_refused(listed: object, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        parse_machines(listed)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no list of machines"):
        read_machines(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("pcs")
    with pytest.raises(ConfigurationError, match="is no list of machines"):
        read_machines(tmp_path / "text.json")
