"""The cache of experts alone, with two tiers on one device, as a GPU has them: the right bytes, and the experts used most."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.storage.tensorfiles import read_header, write_aligned
from rabbit_engine.streaming import ExpertLayer, ExpertSlots, Trace, Transfer, make_unit
from rabbit_engine.streaming.binding import routed
from rabbit_engine.streaming.transfer.plain_ring import PlainRing
from rabbit_engine.streaming.transfer.unit import Extent

COUNT = 12


@pytest.fixture
def layer_units(tmp_path: Path) -> list[Any]:
    path = tmp_path / "experts.safetensors"
    write_aligned(
        path, {"l.up": torch.arange(COUNT * 3000.0).view(COUNT, 3000), "l.bias": torch.arange(COUNT * 5.0).view(COUNT, 5)}, {}
    )
    entries = [t for t in read_header(path).tensors if not t.name.startswith("__pad__")]
    return [make_unit(f"l[{index}]", [entry.rows(index, index + 1) for entry in entries]) for index in range(COUNT)]


@pytest.fixture
def make_transfer(layer_units: list[Any]) -> Iterator[Callable[..., Transfer]]:
    made: list[Transfer] = []

    def make(on_device: int, in_host: int, used: int = 2, passing: int = 2) -> Transfer:
        slot, count = max(unit.nbytes for unit in layer_units), passing + on_device
        ring = PlainRing(torch.device("cpu"), slot * count, Trace())
        host = PlainRing(torch.device("cpu"), slot * in_host, Trace()) if in_host else None
        layers = [ExpertLayer("l", layer_units, used, on_device, in_host)]
        made.append(Transfer([], ring, 0, slots=ExpertSlots(layers=layers, count=count, nbytes=slot, host=host)))
        return made[-1]

    yield make
    for transfer in made:
        transfer.close()


def bring(transfer: Transfer, units: list[Any], *indices: int) -> None:
    with transfer.experts.lend("l", dict.fromkeys(indices, 1.0), 1) as arrivals:
        found = []
        for index, memory in arrivals:
            found.append(index)
            for weight in units[index].weights:
                width = weight.entry.shape[1]
                assert torch.equal(weight.view(memory)[0], torch.arange(index * width, (index + 1) * width, dtype=torch.float32))
    assert sorted(found) == sorted(indices)


def kept(transfer: Transfer) -> set[int]:
    return {expert.index for expert in transfer.experts.layers["l"].kept()}


@pytest.mark.parametrize("tiers", [(0, 0), (3, 0), (0, 3), (2, 3), (12, 0), (5, 7)])
def test_any_two_tiers_bring_the_right_bytes(tiers: tuple[int, int], make_transfer: Any, layer_units: Any) -> None:
    transfer = make_transfer(*tiers)
    generator = torch.Generator().manual_seed(4)
    for _ in range(60):
        bring(transfer, layer_units, *torch.randperm(COUNT, generator=generator)[:3].tolist())
    bring(transfer, layer_units, *range(COUNT))
    profile = transfer.profile().experts["l"]
    stay = transfer.experts.layers["l"].kept()
    assert len(stay) == sum(tiers)
    assert sum(expert.in_host for expert in stay) == tiers[1]
    assert (profile.hit_rate > 0) == (sum(tiers) > 0)
    assert (profile.bytes_copied > 0) == (tiers[1] > 0)
    assert profile.read <= profile.used
    if sum(tiers) == COUNT:
        assert profile.read == COUNT


def test_the_least_used_expert_leaves_and_uses_fade(make_transfer: Any, layer_units: Any) -> None:
    transfer = make_transfer(4, 0)
    for _ in range(10):
        bring(transfer, layer_units, 0, 1)
    bring(transfer, layer_units, 2, 3)
    bring(transfer, layer_units, 4)
    assert {0, 1, 4} <= kept(transfer)
    for _ in range(100):
        bring(transfer, layer_units, 5, 6)
    bring(transfer, layer_units, 7, 8)
    assert kept(transfer) == {5, 6, 7, 8}


def test_a_layer_that_keeps_less_than_a_token_uses_keeps_the_most_used(make_transfer: Any, layer_units: Any) -> None:
    transfer = make_transfer(2, 0, used=3)
    for turn in range(12):
        bring(transfer, layer_units, 0, 1, 2 + turn % 10)
    assert kept(transfer) == {0, 1}
    assert transfer.profile().experts["l"].read <= 2 + 12 + 2


def test_a_prompt_warms_the_cache_with_what_it_used_most(make_transfer: Any, layer_units: Any) -> None:
    transfer = make_transfer(3, 0)
    bring(transfer, layer_units, 0, 1, 2)
    with transfer.experts.lend("l", {index: float(index) for index in range(COUNT)}, 40) as arrivals:
        assert len(list(arrivals)) == COUNT
    assert kept(transfer) == {9, 10, 11}


class SlowRing(PlainRing):
    """Reads of the units in `slow` take until they are let through."""

    slow: set[str]

    def fill(self, chunk: Extent, start: int, after: Any, name: str, lane: int) -> None:
        if name in self.slow:
            self.entered.set()
            assert self.gate.wait(20)
        super().fill(chunk, start, after, name, lane)

    def let_through(self) -> None:
        self.slow = set()
        self.gate.set()


def test_an_abandoned_read_spoils_no_other_expert(layer_units: Any) -> None:
    """An interrupt leaves a read under way to a slot that the layer keeps; the next pass may not give that slot away."""
    slot = max(unit.nbytes for unit in layer_units)
    ring = SlowRing(torch.device("cpu"), slot * 4, Trace())
    ring.slow, ring.gate, ring.entered = {"l[1]"}, threading.Event(), threading.Event()
    transfer = Transfer([], ring, 0, slots=ExpertSlots(layers=[ExpertLayer("l", layer_units, 1, 2)], count=4, nbytes=slot))
    with suppress(KeyboardInterrupt), transfer.experts.lend("l", {0: 1.0, 1: 1.0}, 1):
        assert ring.entered.wait(20)
        raise KeyboardInterrupt
    timer = threading.Timer(0.3, ring.let_through)
    timer.start()
    for _ in range(3):
        for indices in ((2, 3), (4, 5), (0, 1), (2, 1)):
            bring(transfer, layer_units, *indices)
    timer.join()
    transfer.close()


def test_each_sequence_of_a_batch_counts_alike() -> None:
    sequence = torch.arange(6).view(6, 1) % 3
    alone = routed.decayed_uses(sequence, [2, 2, 2], 6)
    batch = torch.cat([sequence, sequence + 3])
    both = routed.decayed_uses(batch, [2] * 6, 6)
    assert [both[index] for index in range(6)] == pytest.approx([alone[index % 3] for index in range(6)])
    assert both[2] > both[0]


def test_a_batch_is_as_long_as_one_of_its_sequences(own_checkpoint: Any, streamed: Any, padded: Any) -> None:
    model = streamed(own_checkpoint("mixtral"))
    with torch.no_grad():
        model(**padded)
    ages = {layer.age for layer in runtime_of(model).transfer.experts.layers.values()}
    assert ages == {padded["input_ids"].shape[1] / routed.HALF_LIFE_TOKENS}


def test_scores_survive_any_number_of_tokens(layer_units: Any) -> None:
    layer = ExpertLayer("l", layer_units, 2, 4)
    for tokens in (1, 10**6, 3, 10**9, 1):
        layer.count({0: 1.0, 1: 0.5}, tokens)
    layer.count({2: 1.0}, 1)
    scores = [expert.score for expert in layer.experts[:4]]
    assert scores[0] == pytest.approx(2 * scores[2], rel=0.05)
    assert scores[0] == pytest.approx(2 * scores[1])
    assert scores[3] == 0
    assert all(score < float("inf") for score in scores)


@pytest.mark.parametrize(("on_device", "in_host"), [(3, 0), (2, 2), (0, 3)])
def test_a_start_keeps_what_was_used_most_and_reads_it_before_the_first_pass(
    on_device: int, in_host: int, layer_units: list[Any], make_transfer: Callable[..., Transfer]
) -> None:
    first = make_transfer(on_device, in_host)
    for index in (7, 7, 7, 2, 2, 9, 7, 2, 7):
        bring(first, layer_units, index)
    uses = first.experts.uses()
    assert sorted(uses["l"], key=lambda index: -uses["l"][index]) == [7, 2, 9]
    second = make_transfer(on_device, in_host)
    assert second.experts.warm(uses) == 3
    assert second.experts.uses()["l"] == pytest.approx(uses["l"])
    before = second.profile().experts["l"].read
    bring(second, layer_units, 7)
    bring(second, layer_units, 2, 9)
    assert second.profile().experts["l"].read == before
    bring(second, layer_units, 4)
    assert second.profile().experts["l"].read == before + 1
