"""Plans are pure: tables of cases and properties, no device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rabbit_engine.errors import BudgetError
from rabbit_engine.planner import UnitSize, place
from rabbit_engine.splitplan import files_done_after, missing_weights, peak_extra_bytes, plan_shards, settle_ties

LAYERS = [UnitSize(f"layers.{i}", "layer", 100) for i in range(4)]
HEAD = UnitSize("lm_head", "head", 300)
REST = [UnitSize("embed", "embedding", 300), UnitSize("norm", "resident", 1)]
UNITS = [*REST, *LAYERS, HEAD]


@pytest.mark.parametrize(
    ("units", "budget", "resident", "streamed", "device_bytes"),
    [
        (UNITS, None, ("norm", "lm_head"), 4, 1 + 300 + 200),
        (UNITS, 600, ("norm", "lm_head"), 4, 501),
        ([*REST, *LAYERS, UnitSize("lm_head", "head", 50)], 220, ("norm",), 5, 201),
        ([*LAYERS], 200, (), 4, 200),
        ([UnitSize("norm", "resident", 7)], 7, ("norm",), 0, 7),
    ],
)
def test_what_stays(
    units: list[UnitSize], budget: int | None, resident: tuple[str, ...], streamed: int, device_bytes: int
) -> None:
    plan = place(units, "cpu", budget, None)
    assert set(plan.resident) == set(resident)
    assert len(plan.streamed) == streamed
    assert plan.device_bytes == device_bytes


def test_too_small_a_budget_names_the_smallest() -> None:
    with pytest.raises(BudgetError, match=r"max_memory=\{0: 501\}"):
        place(UNITS, "cuda:0", 500, None)
    with pytest.raises(BudgetError, match=r'max_memory=\{"cpu": 200\}'):
        place(UNITS, "cuda:0", 600, 199)


sizes = st.integers(0, 10**12)


@given(st.lists(sizes, min_size=1, max_size=20), sizes, sizes, sizes, st.none() | st.integers(0, 10**14))
def test_budgets_hold_and_every_unit_is_placed_once(
    layers: list[int], head: int, embed: int, rest: int, budget: int | None
) -> None:
    units = [UnitSize(f"l{i}", "layer", size) for i, size in enumerate(layers)]
    units += [UnitSize("head", "head", head), UnitSize("embed", "embedding", embed), UnitSize("rest", "resident", rest)]
    try:
        plan = place(units, "cpu", budget, None)
    except BudgetError as error:
        smallest = int(str(error).split(": ")[-1].split("}")[0])
        assert budget is not None
        assert smallest > budget
        assert place(units, "cpu", smallest, None).device_bytes <= smallest
        return
    assert budget is None or plan.device_bytes <= budget
    assert sorted([*plan.resident, *plan.streamed, *plan.by_row]) == sorted(unit.name for unit in units)
    assert plan.weights_bytes == sum(unit.nbytes for unit in units)
    assert str(plan)


SHARDS = plan_shards(
    ["embed", "l0", "l1", "head", "none"],
    {"e": "embed", "a": "l0", "b": "l0", "c": "l1", "h": "head"},
    {"e": "f1", "a": "f1", "b": "f2", "c": "f2", "h": "f2"},
    {"embed": 10, "l0": 20, "l1": 20, "head": 10, "none": 0},
)


def test_shards_are_planned_in_pass_order_and_empty_ones_left_out() -> None:
    assert [(plan.name, plan.keys) for plan in SHARDS] == [
        ("embed", ("e",)),
        ("l0", ("a", "b")),
        ("l1", ("c",)),
        ("head", ("h",)),
    ]
    assert files_done_after(SHARDS) == {"embed": [], "l0": ["f1"], "l1": [], "head": ["f2"]}


@pytest.mark.parametrize(
    ("finished", "freed", "peak"),
    [((), {}, 60), ((), {"f1": 25, "f2": 35}, 35), (("embed", "l0"), {}, 30), (("embed", "l0"), {"f1": 25, "f2": 35}, 5)],
)
def test_disk_needed_is_the_peak_not_the_sum(finished: tuple[str, ...], freed: dict[str, int], peak: int) -> None:
    assert peak_extra_bytes(SHARDS, frozenset(finished), freed) == peak


@pytest.mark.parametrize(
    ("present", "equal", "shared", "dropped"),
    [
        ({"embed"}, True, {"head": "embed"}, set()),
        ({"head"}, True, {"embed": "head"}, set()),
        ({"embed", "head"}, True, {"head": "embed"}, {"head"}),
        ({"embed", "head"}, False, {}, set()),
        (set(), True, {}, set()),
    ],
)
def test_ties_are_settled_as_transformers_does(present: set[str], equal: bool, shared: dict[str, str], dropped: set[str]) -> None:
    ties = settle_ties({"head": "embed"}, frozenset(present), lambda *_: equal)
    assert (dict(ties.shared), ties.dropped) == (shared, dropped)


def test_three_weights_tied_to_one_source() -> None:
    ties = settle_ties({"a": "source", "b": "source"}, frozenset({"b"}), lambda *_: True)
    assert ties.shared == {"a": "b", "source": "b"}


def test_missing_weights_heeds_what_may_be_missing() -> None:
    assert missing_weights(["a", "b.bias", "c", "d"], ["a"], {"c": "a"}, [r"\.bias$"]) == ["d"]
