"""Machines that lack the model of a batch fetch it from the driver's; one Ray of two machines, each with its own Hub cache."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
from fake_hub import COMMIT
from huggingface_hub import constants
from local_cluster import LocalCluster, local_cluster
from tiny import IDS, words

from rabbit_engine import AutoModelForCausalLM, batch, errors
from rabbit_engine.batches import Choices, Order
from rabbit_engine.batches.cluster import files
from rabbit_engine.batches.cluster.files import located, own_model
from rabbit_engine.batches.cluster.order import Failure
from rabbit_engine.batches.cluster.probe import probe
from rabbit_engine.checkpoints import execute
from rabbit_engine.cluster.description import describe, extents_of
from rabbit_engine.cluster.sending import DriverFiles
from rabbit_engine.cluster.stored import stored_copies
from rabbit_engine.model.sent_files import SentFiles
from rabbit_engine.storage.partial import PresentExtents, read_present
from rabbit_engine.utils.sizes import format_bytes

NAME, LINES = "someone/tiny", 12


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = families.save("llama", tmp_path_factory.mktemp("talker"), num_hidden_layers=4)
    words(96).save_pretrained(folder)
    return folder


def cached(home: Path, folder: Path) -> Path:
    """A Hub cache below `home` that has the model."""
    repo = home / "hub" / f"models--{NAME.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    return home / "hub"


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory, talker: Path) -> tuple[Path, Path]:
    """Those of the driver, which has the model, and of the other machine, which does not."""
    driver, other = tmp_path_factory.mktemp("driver"), tmp_path_factory.mktemp("other")
    cached(driver, talker)
    return driver, other


@pytest.fixture(scope="module")
def ray_cluster(homes: tuple[Path, Path]) -> Iterator[LocalCluster]:
    def environment(home: Path) -> dict[str, str]:
        paths = f"{Path(__file__).parent.parent}{os.pathsep}{Path(__file__).parent}"
        return {"HF_HOME": str(home), "RABBIT_ENGINE_CACHE": str(home / "own"), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}

    with local_cluster(environments=[environment(home) for home in homes]) as cluster:
        yield cluster


def test_a_machine_without_the_model_fetches_it_from_the_driver_and_answers(
    ray_cluster: LocalCluster, homes: tuple[Path, Path], talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(homes[0] / "hub"))
    source = tmp_path / "in.jsonl"
    asked = [{"custom_id": f"c{n}", "prompt": f"w{n} w5 w7", "max_tokens": 8} for n in range(LINES)]
    source.write_text("".join(f"{json.dumps(line)}\n" for line in asked))
    loading: dict[str, Any] = {"device": "cpu", "max_memory": {"cpu": "1MB"}, "max_requests": 2}
    batch(NAME, source, tmp_path / "local.jsonl", **loading)
    report = batch(NAME, source, tmp_path / "out.jsonl", cluster=ray_cluster.address, workers=2, **loading)
    assert (report.lines, report.failed) == (LINES, 0)
    assert texts(tmp_path / "out.jsonl") == texts(tmp_path / "local.jsonl")
    (copy,) = stored_copies(homes[1] / "own" / "copies")
    assert (copy.name, stored_copies(homes[0] / "own" / "copies")) == (NAME, [])
    weights = list(copy.folder.rglob("*.safetensors"))
    spans = [span for path in weights for span in (read_present(path) or PresentExtents()).spans]
    size = sum(path.stat().st_size for path in weights)
    assert sum(stop - first for first, stop in spans) > 0.9 * size, "all layers, not only headers"


def texts(path: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}
    assert len(found) == len(lines), "a line is answered twice"
    return found


class NoClient:
    """A Ray whose driver is a machine of it."""

    class util:
        class client:
            class ray:
                @staticmethod
                def is_connected() -> bool:
                    return False

        @staticmethod
        def get_node_ip_address() -> str:
            return "10.0.0.7"


def elsewhere(order: Order, monkeypatch: pytest.MonkeyPatch) -> tuple[Order, SentFiles]:
    """The order on a machine that does not have the model, and the driver's files, sent without Ray."""
    own = own_model(NoClient, order)  # type: ignore[arg-type]
    assert own is not None
    streamed, _ = execute(own, progress=False)
    here = describe(streamed)
    driver = DriverFiles(here)
    monkeypatch.setattr("rabbit_engine.batches.cluster.probe.require_ray", lambda: NoClient)
    away = replace(here, name="/nowhere/talker", driver="driver")
    sent = SentFiles("digest", away, extents_of(streamed, list(streamed.entries)), lambda: driver.read)
    return replace(order, model="/nowhere/talker"), sent


@pytest.mark.parametrize("loading", [{}, {"dtype": "bfloat16"}, {"compression": "8bit"}])
def test_what_is_fetched_loads_as_the_drivers_does(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loading: dict[str, Any]
) -> None:
    copy = Path(shutil.copytree(talker, tmp_path / "talker"))  # two of them are split
    monkeypatch.setenv("RABBIT_ENGINE_CACHE", str(tmp_path / "cache"))
    there = Order.of(copy, Choices(), {"device": "cpu", "token": "hf_secret", **loading})
    order, sent = elsewhere(there, monkeypatch)
    assert probe(order, sent) == "digest"
    name, keywords = located(order, sent)
    assert (Path(name).is_relative_to(tmp_path / "cache"), keywords["token"]) == (True, None)
    ids = {"input_ids": IDS}
    with (
        AutoModelForCausalLM.from_pretrained(name, **keywords) as found,
        AutoModelForCausalLM.from_pretrained(copy, **there.loading) as expected,
    ):
        assert found(**ids).logits.equal(expected(**ids).logits)
    assert located(there, sent) == (str(copy), there.loading), "a machine that has the model reads its own"


def test_a_driver_without_the_files_or_the_device_sends_none(talker: Path) -> None:
    for order in (
        Order.of("/nowhere/talker", Choices(), {}),
        Order.of(NAME, Choices(), {"device": "cpu"}),
        Order.of(talker, Choices(), {"device": "cuda:99"}),
    ):
        assert own_model(NoClient, order) is None  # type: ignore[arg-type]


def test_a_machine_that_neither_has_nor_can_hold_the_files_says_so_before_any_weight_is_sent(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RABBIT_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rabbit_engine.cluster.description.ALWAYS_BYTES", 16)  # so that headers of a tiny model are less than it
    monkeypatch.setattr("rabbit_engine.cluster.copies._GAP", 0)
    order, sent = elsewhere(Order.of(talker, Choices(), {"device": "cpu"}), monkeypatch)
    room = int(0.9 * sum(row.nbytes for row in sent.description.files))  # enough for headers
    monkeypatch.setattr("rabbit_engine.cluster.stored._free", lambda _: room)
    failure = probe(order, sent)
    assert isinstance(failure, Failure)
    assert (failure.kind, f"{format_bytes(room)} are free" in failure.message) == (errors.NotEnoughDiskError.__name__, True)
    failure = probe(order)
    assert isinstance(failure, Failure)
    assert failure.kind in files.ABSENT
