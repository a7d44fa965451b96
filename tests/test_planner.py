"""Plans are pure: tables of cases and properties, no device."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabbit_engine.checkpoints.split_plan import files_done_after, missing_weights, peak_extra_bytes, plan_shards, settle_ties
from rabbit_engine.errors import BudgetError
from rabbit_engine.planning.experts import Routing
from rabbit_engine.planning.placement import place, place_in
from rabbit_engine.planning.plan import Decoding, Plan
from rabbit_engine.planning.tiers import TEXTS, Budget, Tenant, Tier, UnitSize, tenants_of
from rabbit_engine.utils.speeds import Speeds


def layers(*sizes: int) -> list[UnitSize]:
    return [UnitSize(f"l{index}", "streamed", size) for index, size in enumerate(sizes)]


EMBED, NORM = UnitSize("embed", "embedding", 300), UnitSize("norm", "resident", 1)
FOUR = [EMBED, NORM, *layers(100, 100, 100, 100)]
UNEVEN = [NORM, *layers(100, 40, 40, 100, 40, 40)]


@pytest.mark.parametrize(
    ("units", "budget", "resident", "streamed", "by_row", "device_bytes"),
    [
        pytest.param(FOUR, None, 6, 0, 0, 701, id="no bound: everything stays, the embedding too"),
        pytest.param(FOUR, 701, 6, 0, 0, 701, id="just enough for everything"),
        pytest.param(FOUR, 700, 5, 0, 1, 401, id="the embedding is the last to stay"),
        pytest.param(FOUR, 400, 2, 3, 1, 301, id="a byte short of every layer: a ring of two, one stays"),
        pytest.param(FOUR, 201, 1, 4, 1, 201, id="the smallest that works"),
        pytest.param(UNEVEN, 241, 2, 5, 0, 241, id="a small one stays where a large one does not fit"),
        pytest.param([NORM], 1, 1, 0, 0, 1, id="nothing to stream"),
        pytest.param([NORM, *layers(70)], 71, 2, 0, 0, 71, id="one layer"),
    ],
)
def test_what_stays(
    units: list[UnitSize], budget: int | None, resident: int, streamed: int, by_row: int, device_bytes: int
) -> None:
    plan = place(units, "cpu", Budget(device_bytes=budget))
    assert (len(plan.resident), len(plan.streamed), len(plan.by_row)) == (resident, streamed, by_row)
    assert plan.device_bytes == device_bytes
    assert plan.link_bytes == 0


@pytest.mark.parametrize(
    ("device", "host", "resident", "in_host", "from_disk"),
    [
        (401, 0, 5, 0, 0),
        (301, 1000, 2, 3, 0),  # fits the host: no disk in the loop
        (301, 200, 2, 2, 1),
        (301, 99, 2, 0, 3),
        (201, None, 1, 4, 0),
    ],
)
def test_host_memory_is_the_second_tier_of_a_gpu(
    device: int, host: int | None, resident: int, in_host: int, from_disk: int
) -> None:
    plan = place(FOUR, "cuda:0", Budget(device_bytes=device, host_bytes=host), Speeds(disk=50, link=100, source="given"))
    assert (len(plan.resident), len(plan.host), len(plan.streamed)) == (resident, in_host, from_disk)
    assert plan.link_bytes == 100 * (in_host + from_disk)
    assert plan.pass_s == max(100 * from_disk / 50, 100 * (in_host + from_disk) / 100)
    assert plan.bound == ("disk" if from_disk * 2 >= in_host + from_disk > 0 else "link" if in_host else "compute")


@pytest.mark.parametrize(
    ("units", "smallest"),
    [
        (FOUR, 201),
        ([NORM, *layers(70, 30, 90)], 181),
        ([NORM, UnitSize("rest", "streamed", 50, encloses=True), *layers(70, 30, 30, 30)], 191),
    ],
)
def test_too_small_a_budget_names_the_smallest(units: list[UnitSize], smallest: int) -> None:
    with pytest.raises(BudgetError, match=rf"max_memory=\{{0: {smallest}\}}") as caught:
        place(units, "cuda:0", Budget(device_bytes=smallest - 1))
    assert caught.value.smallest_bytes == smallest
    assert place(units, "cuda:0", Budget(device_bytes=smallest)).device_bytes <= smallest


def test_staging_is_part_of_the_budget() -> None:
    plan = place(FOUR, "cpu", Budget(device_bytes=301, host_staging_bytes=100))
    assert (plan.device_bytes, plan.staging_bytes) == (201, 100)
    with pytest.raises(BudgetError, match=r'max_memory=\{"cpu": 301\}'):
        place(FOUR, "cpu", Budget(device_bytes=300, host_staging_bytes=100))
    with pytest.raises(BudgetError, match=r'max_memory=\{"cpu": 100\}'):
        place(FOUR, "cuda:0", Budget(device_bytes=300, host_bytes=99, host_staging_bytes=100))


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_scratch_for_decoding_is_set_aside_within_the_budget(device: str) -> None:
    """A layer keeps its own scratch while one unit inside of it decodes; what stays is decoded before use as well."""
    around = [UnitSize(f"rest{index}", "streamed", 10, encloses=True, scratch_bytes=size) for index, size in enumerate((20, 30))]
    inside = [UnitSize(f"l{index}", "streamed", 100, scratch_bytes=size) for index, size in enumerate((200, 400, 0))]
    plan = place([NORM, *around, *inside], device, Budget(device_bytes=701))
    assert (plan.scratch_bytes, plan.resident_bytes + plan.ring_bytes) == (430, 1 + 10 + 10 + 210)
    assert plan.device_bytes == 661  # 40 are left: less than one of the others
    assert dict(plan.rows())["scratch for decoding"] == f"430 B on {device}"
    assert place([NORM, *around, *inside], device).device_bytes == 321 + 430
    with pytest.raises(BudgetError) as caught:
        place([NORM, *around, *inside], device, Budget(device_bytes=640))
    assert caught.value.smallest_bytes == 1 + 210 + 430
    assert "scratch for decoding" not in dict(place(FOUR, device, Budget(device_bytes=300)).rows())


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_temporaries_of_decoding_are_counted_once_and_not_claimed(device: str) -> None:
    """One weight is decoded at a time."""
    units = [UnitSize(f"l{index}", "streamed", 100, scratch_bytes=200, work_bytes=size) for index, size in enumerate((50, 70, 0))]
    plan = place([NORM, *units], device, Budget(device_bytes=471))
    assert (plan.device_bytes, plan.held_bytes(device)) == (1 + 200 + 200, 471)
    assert dict(plan.rows())["temporaries of decoding"] == f"70 B on {device}"
    with pytest.raises(BudgetError) as caught:
        place([NORM, *units], device, Budget(device_bytes=470))
    assert caught.value.smallest_bytes == 471


def test_residents_are_spread_evenly_over_the_depth() -> None:
    units = layers(*[100] * 80)  # the ring is two of them: too small for four reads of 8 MiB anyway
    for kept in (8, 20, 40, 60):
        plan = place(units, "cpu", Budget(device_bytes=200 + 100 * kept))
        places = [int(name[1:]) for name in plan.resident]
        gaps = [after - before for before, after in zip(places, [*places[1:], places[0] + 80], strict=True)]
        assert len(places) == kept
        assert max(gaps) <= 2 * 80 / kept + 1


def test_the_reason_names_what_limits_a_pass() -> None:
    speeds = Speeds(disk=5e9, link=13e9, source="given")
    layer = 1_711_308_800
    llama_70b = [UnitSize(f"l{i}.{j}", "streamed", layer // 4) for i in range(80) for j in range(4)]
    llama_70b.append(UnitSize("embed", "embedding", 2_101_346_304))
    disk = place(llama_70b, "cuda:0", Budget(device_bytes=2 * 2**30, host_bytes=24 * 10**9), speeds)
    assert disk.device_bytes < 2 * 2**30
    assert disk.reason.endswith("GB/s (given): at least 22.3 s a token, the first after 27.4 s")
    link = place(llama_70b, "cuda:0", Budget(device_bytes=2 * 2**30, host_bytes=150 * 10**9), speeds)
    assert "over the link to cuda:0 at 13.00 GB/s (given), no disk in the loop" in link.reason
    assert place(llama_70b, "cuda:0").reason.startswith("everything fits")
    assert ("streamed", "0 units, 0 B a pass from disk") in link.rows()


def gpus(first: int, second: int, host: int, remote: int) -> list[Tier]:
    """Two GPUs that compute, host memory, another machine's memory that comes through the host's, and the disk."""
    return [
        Tier("cuda:0", first, holds=frozenset({"weights", "experts", "caches"})),
        Tier("cuda:1", second),
        Tier("host", host, rate=25.0),
        Tier("node-2", remote, rate=10.0, via="host"),
        Tier("disk", rate=2.0, via="host"),
    ]


@pytest.mark.parametrize(
    ("memory", "on_first", "on_second", "in_host", "remote", "from_disk", "bound_by"),
    [
        pytest.param((301, 400, 0, 0), 2, 4, 0, 0, 0, None, id="a stretch of the model on each GPU"),
        pytest.param((201, 100, 0, 0), 1, 1, 0, 0, 3, "disk", id="the ring is on the first"),
        pytest.param((301, 0, 0, 100), 2, 0, 0, 1, 2, "disk", id="a layer each from where there is room"),
        pytest.param((201, 100, 100, 200), 1, 1, 1, 2, 0, "node-2", id="the next tier when one is full"),
        pytest.param((201, 100, 300, 300), 1, 1, 3, 0, 0, "host", id="the fastest tier first"),
    ],
)
def test_a_second_gpu_and_another_machine_are_tiers_of_a_plan(
    memory: tuple[int, int, int, int],
    on_first: int,
    on_second: int,
    in_host: int,
    remote: int,
    from_disk: int,
    bound_by: str | None,
) -> None:
    tiers = gpus(*memory)
    plan = place_in([EMBED, NORM, *layers(100, 100, 100, 100)], tiers)
    kept = [len(plan.kept(tier.name)) for tier in tiers]
    assert kept == [on_first, on_second, in_host, remote, from_disk + len(plan.by_row)]
    slowest = plan.slowest()
    assert (slowest and slowest.name) == bound_by
    moved = {tier.name: plan.moved_bytes(tier) for tier in tiers}
    assert moved == {
        "cuda:0": 0,
        "cuda:1": 0,
        "host": 100 * (in_host + remote + from_disk),
        "node-2": 100 * remote,
        "disk": 100 * from_disk,
    }
    assert plan.pass_s == max(moved["host"] / 25, moved["node-2"] / 10, moved["disk"] / 2)
    assert all(tier.nbytes is None or plan.held_bytes(tier.name) <= tier.nbytes for tier in tiers)
    assert ("on cuda:1" in dict(plan.rows())) == (on_second > 0)


def test_caches_of_texts_share_a_tier_with_weights() -> None:
    plan = place(FOUR, "cuda:0", Budget(device_bytes=351, reserved_bytes=50, host_bytes=100))
    assert (plan.tiers[0].nbytes, plan.held_bytes("cuda:0")) == (351, 351)
    assert Tenant(TEXTS, "cuda:0", 50) in plan.tenants
    elsewhere = [
        Tier("cuda:0", 301),
        Tier("host", 250, rate=25.0, holds=frozenset({"weights", "caches"})),
        Tier("disk", rate=2.0),
    ]
    moved = place_in(FOUR, elsewhere, tenants_of(elsewhere, Budget(reserved_bytes=50)))
    assert (moved.held_bytes("cuda:0"), moved.held_bytes("host")) == (301, 250)
    assert (len(moved.resident), len(moved.host), len(moved.streamed)) == (2, 2, 1)


@pytest.mark.parametrize(
    ("by_default", "words", "smallest"),
    [
        (False, r"needs 201 B for weights .* and 50 B for the tokens of max_seq_len, the budget is 250 B: ", 251),
        (True, r"needs 201 B for weights \([^)]*\), the budget is 200 B: ", 201),
    ],
    ids=["max_seq_len was given", "max_memory would reserve nothing"],
)
def test_the_smallest_budget_counts_caches_only_if_giving_it_would(by_default: bool, words: str, smallest: int) -> None:
    with pytest.raises(BudgetError, match=rf"^cuda:0 {words}give max_memory=\{{0: {smallest}\}}") as caught:
        place(FOUR, "cuda:0", Budget(device_bytes=250, reserved_bytes=50, reserved_by_default=by_default))
    assert caught.value.smallest_bytes == smallest


sizes = st.integers(1, 10**12)
models = st.builds(
    lambda streamed, embed, rest: [*layers(*streamed), UnitSize("embed", "embedding", embed), UnitSize("rest", "resident", rest)],
    st.lists(sizes, min_size=1, max_size=40),
    sizes,
    sizes,
)


def placed(units: list[UnitSize], device: str, budget: Budget) -> Plan | int:
    """The plan, or the smallest budget that works."""
    try:
        return place(units, device, budget)
    except BudgetError as error:
        return error.smallest_bytes


@given(models, st.sampled_from(["cpu", "cuda:0"]), st.integers(0, 10**14), st.integers(0, 10**14))
def test_budgets_hold_and_every_unit_is_placed_once(
    units: list[UnitSize], device: str, device_bytes: int, host_bytes: int
) -> None:
    budget = Budget(device_bytes=device_bytes, host_bytes=host_bytes)
    plan = placed(units, device, budget)
    if isinstance(plan, int):
        assert plan > device_bytes
        assert isinstance(placed(units, device, Budget(device_bytes=plan, host_bytes=host_bytes)), Plan)
        assert isinstance(placed(units, device, Budget(device_bytes=plan - 1, host_bytes=host_bytes)), int)
        return
    assert plan.device_bytes <= device_bytes
    assert plan.host_bytes <= host_bytes
    everything = [*plan.resident, *plan.host, *plan.streamed, *plan.by_row]
    assert sorted(everything) == sorted(unit.name for unit in units)
    assert plan.weights_bytes == sum(unit.nbytes for unit in units)
    moving = [unit.nbytes for unit in units if unit.name in (*plan.host, *plan.streamed)]
    assert plan.ring_bytes >= 2 * max(moving, default=0)
    assert str(plan)


@settings(max_examples=400)
@given(models, st.integers(0, 10**14), st.integers(0, 10**14), st.integers(0, 10**13), st.integers(0, 10**13))
def test_more_memory_never_means_more_bytes(units: list[UnitSize], device: int, host: int, more: int, more_host: int) -> None:
    less = placed(units, "cuda:0", Budget(device_bytes=device, host_bytes=host))
    if isinstance(less, int):
        return
    on_device = place(units, "cuda:0", Budget(device_bytes=device + more, host_bytes=host))
    assert on_device.link_bytes <= less.link_bytes
    assert on_device.pass_bytes <= less.pass_bytes
    in_host = place(units, "cuda:0", Budget(device_bytes=device, host_bytes=host + more_host))
    assert in_host.pass_bytes <= less.pass_bytes
    cpu = place(units, "cpu", Budget(device_bytes=device))
    assert place(units, "cpu", Budget(device_bytes=device + more)).pass_bytes <= cpu.pass_bytes


def experts(layers: int, count: int, used: int, nbytes: int) -> list[UnitSize]:
    return [
        UnitSize(f"e{index}", "experts", count * nbytes, routing=Routing(count, used, nbytes, nbytes)) for index in range(layers)
    ]


SPARSE = [NORM, *layers(100, 100, 100, 100), *experts(4, 8, 2, 10)]


@pytest.mark.parametrize(
    ("budget", "ring", "streamed", "passing", "cached", "least", "most"),
    [
        pytest.param(721, 0, 0, 0, 0, 0, 0, id="everything stays, experts too, and nothing is routed by us"),
        pytest.param(720, 0, 0, 5, 26, 0, 80, id="a byte short: all but six are cached, or on their way"),
        pytest.param(451, 0, 0, 5, 0, 80, 80, id="dense weights first: all of them, and no expert"),
        pytest.param(461, 0, 0, 5, 1, 70, 80, id="then an expert"),
        pytest.param(421, 0, 0, 2, 0, 80, 80, id="without a ring, dense weights all stay sooner"),
        pytest.param(420, 200, 3, 5, 6, 320, 380, id="a ring, one layer, and experts in the rest"),
        pytest.param(221, 200, 4, 2, 0, 480, 480, id="the smallest that works"),
    ],
)
def test_what_experts_get(budget: int, ring: int, streamed: int, passing: int, cached: int, least: int, most: int) -> None:
    plan = place(SPARSE, "cpu", Budget(device_bytes=budget))
    assert (plan.ring_bytes, len(plan.streamed)) == (ring, streamed)
    shares = [layer.on_device for layer in plan.experts.layers]
    assert (plan.experts.passing, sum(shares)) == (passing, cached)
    assert max(shares, default=0) - min(shares, default=0) <= 1
    assert (plan.least_pass_bytes, plan.pass_bytes) == (least, most)
    assert plan.device_bytes <= budget
    assert plan.prompt_bytes == (plan.pass_bytes - 80 + 320 if plan.experts.layers else 0)


def test_host_memory_holds_experts_behind_the_device() -> None:
    def plan(host: int) -> Plan:
        return place(SPARSE, "cuda:0", Budget(device_bytes=471, host_bytes=host), Speeds(disk=1, link=10, source="given"))

    tight, ample = plan(100), plan(1000)
    assert sorted(layer.on_device for layer in tight.experts.layers) == [0, 0, 1, 1]
    assert sum(layer.in_host for layer in tight.experts.layers) == 10
    assert sum(layer.in_host + layer.on_device for layer in ample.experts.layers) == 32
    assert (tight.least_pass_bytes, ample.least_pass_bytes, ample.pass_bytes) == (0, 0, 80)
    assert (ample.link_bytes, ample.least_pass_s) == (80, 60 / 10)
    assert ample.host_bytes == 300
    assert "2 cached on the device, 30 in host memory" in str(ample)
    assert "0 B (as many experts cached as possible) to 80 B (none) a pass" in ample.reason
    with pytest.raises(BudgetError, match="221"):
        place(SPARSE, "cuda:0", Budget(device_bytes=220))


def test_a_tier_that_is_not_for_experts_caches_none() -> None:
    tiers = gpus(471, 100, 100, 100)
    tiers[1] = Tier("cuda:1", 100, holds=frozenset({"weights"}))
    plan = place_in(SPARSE, tiers)
    assert [sum(layer.cached[index] for layer in plan.experts.layers) for index in range(4)] == [2, 0, 10, 10]
    assert plan.tier_of["l3"] == "cuda:0"


def test_experts_in_another_machines_memory_move_over_its_link() -> None:
    """Of the eight that a token uses two are on the device and two in host memory at best."""
    plan = place_in(SPARSE, gpus(471, 0, 20, 1000))
    moved = {tier.name: (plan.moved_bytes(tier), plan.moved_bytes(tier, cached=True)) for tier in plan.tiers[2:]}
    assert moved == {"host": (80, 60), "node-2": (0, 40), "disk": (80, 0)}  # with none cached, all come from disk
    assert plan.host_bytes == 20
    assert "2 cached on the device, 2 in host memory, 28 on node-2" in str(plan)


sparse_models = st.builds(
    lambda dense, count, used, nbytes, rest: [
        *layers(*dense),
        *experts(len(dense), count, min(used, count), nbytes),
        UnitSize("rest", "resident", rest),
    ],
    st.lists(st.integers(1, 10**9), min_size=1, max_size=20),
    st.integers(2, 64),
    st.integers(1, 8),
    st.integers(1, 10**8),
    st.integers(1, 10**9),
)


@settings(max_examples=300)
@given(sparse_models, st.sampled_from(["cpu", "cuda:0"]), st.integers(0, 10**11), st.integers(0, 10**11), st.integers(0, 10**10))
def test_budgets_hold_for_sparse_models(units: list[UnitSize], device: str, budget: int, host: int, more: int) -> None:
    plan = placed(units, device, Budget(device_bytes=budget, host_bytes=host))
    if isinstance(plan, int):
        assert plan > budget
        assert isinstance(placed(units, device, Budget(device_bytes=plan, host_bytes=host)), Plan)
        assert isinstance(placed(units, device, Budget(device_bytes=plan - 1, host_bytes=host)), int)
        return
    assert plan.device_bytes <= budget
    assert plan.host_bytes <= host
    assert plan.least_pass_bytes <= plan.pass_bytes <= plan.prompt_bytes
    for layer in plan.experts.layers:
        assert layer.on_device + layer.in_host <= layer.routing.count
    for share in ("on_device", "in_host"):
        shares = [getattr(layer, share) for layer in plan.experts.layers]
        full = any(layer.on_device + layer.in_host == layer.routing.count for layer in plan.experts.layers)
        assert full or max(shares, default=0) - min(shares, default=0) <= 1
    larger = place(units, device, Budget(device_bytes=budget + more, host_bytes=host))
    assert larger.pass_bytes <= plan.pass_bytes
    assert larger.link_bytes <= plan.link_bytes


SHARDS = plan_shards(
    ["embed", "l0", "l1", "head", "none"],
    [("e", "embed"), ("a", "l0"), ("b", "l0"), ("c", "l1"), ("h", "head")],
    {key: frozenset([file]) for key, file in {"e": "f1", "a": "f1", "b": "f2", "c": "f2", "h": "f2"}.items()},
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


def test_missing_weights_excludes_those_that_may_be_missing() -> None:
    assert missing_weights(["a", "b.bias", "c", "d"], ["a"], {"c": "a"}, [r"\.bias$"]) == ["d"]


@pytest.mark.parametrize(("seconds", "bound"), [(0.0, "disk"), (1e-8, "disk"), (900.0, "decoding")])
def test_decoding_bounds_a_pass_if_it_takes_longer_than_what_moves(seconds: float, bound: str) -> None:
    plan = replace(place(FOUR, "cpu", Budget(device_bytes=400)), decoding=Decoding(10**9, seconds))
    assert plan.pass_bytes > 0
    assert plan.bound == plan.least_bound == bound
    assert plan.pass_s == max(seconds, plan.link_seconds(plan.tiers[-1]))
    assert ("decoded at" in plan.reason) == (bound == "decoding")
    assert ("would take" in plan.reason) == (bound == "decoding")


def test_decoding_bounds_a_pass_in_which_nothing_moves() -> None:
    plan = replace(place(FOUR, "cpu", Budget()), decoding=Decoding(10**9, 0.5))
    assert plan.bound == "decoding"
    assert "1.00 GB a pass decoded at 2.00 GB/s (measured): about 0.5 s a token" in plan.reason
    assert plan.reason.endswith("no weight moves after loading")
