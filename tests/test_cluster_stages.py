"""A model whose layers are on several Ray nodes of this machine: the answers of transformers, also through their ends."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from local_cluster import LocalCluster, local_cluster
from long_texts import answer, prompt
from peft import LoraConfig, get_peft_model
from tiny import words

from rabbit_engine import AutoModel, Session
from rabbit_engine.cluster.worker import WorkerHandle
from rabbit_engine.errors import (
    BudgetError,
    ClusterError,
    ConfigurationError,
    MachinesDifferError,
    PromptTooLongError,
    StageLostError,
)
from rabbit_engine.model import cluster as clusters
from rabbit_engine.model.auto import read_settings
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.machines import Machine
from rabbit_engine.transformers_bridge.adapters import remove_adapter

LAYERS = 9
NODE_BYTES = 420_000
"""Of 9 layers with 41 kB each, with room for 64 tokens and 197 kB for misaligned reads."""
ON: dict[str, Any] = {"device": "cpu", "max_seq_len": 64}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[LocalCluster]:
    with local_cluster(nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import families

    return families.save("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def small_machines() -> Iterator[None]:
    """Every machine has memory for some of the layers, and none is measured."""

    def machines_of(facts: Any, _: Any) -> list[Machine]:
        return [Machine(name=one.name, memory_bytes=NODE_BYTES, disk=one.name, link_rate=1e8) for one in facts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "machines_of", machines_of)
        yield


@pytest.fixture(scope="module")
def model(ray_cluster: LocalCluster, folder: Path, small_machines: None) -> Iterator[Any]:
    with AutoModel.from_pretrained(folder, **ON, cluster=ray_cluster.address) as loaded:
        yield loaded


def _stages(model: Any) -> Any:
    return runtime_of(model).assembly.stages


def test_the_answers_of_one_machine(model: Any, folder: Path, plain: Any) -> None:
    expected = plain(folder)
    assert len({stage.name for stage in _stages(model)}) == 2
    ids = prompt(19)
    for keywords in ({}, {"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}):
        found, theirs = (answer(one, ids, **keywords) for one in (model, expected))
        assert torch.equal(found.sequences, theirs.sequences)
    assert all(torch.equal(mine, other) for mine, other in zip(found.scores, theirs.scores, strict=True))


def test_a_plan_says_what_loading_does(model: Any, ray_cluster: LocalCluster, folder: Path, rabbit: Any) -> None:
    plan = runtime_of(model).assembly.stages_plan
    found = clusters.forecast_on_cluster(folder, read_settings(ON), ray_cluster.address)
    assert [(one.layers, one.machine.name) for one in found.stages] == [(one.layers, one.machine.name) for one in plan.stages]
    done = rabbit("plan", folder, "--cluster", ray_cluster.address, "--max-seq-len", "64")
    assert done.code == 0, done.err
    assert all(f"layers {one.first}-{one.stop - 1}" in done.out for one in found.stages)


def test_a_text_that_a_machine_has_no_memory_for_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _stages(model)[0]
    assert 0 < stage.free_bytes() <= psutil.virtual_memory().total
    monkeypatch.setattr(stage, "free_bytes", lambda: 1000)
    with pytest.raises(PromptTooLongError):
        model.generate(prompt(19), max_new_tokens=5)


def test_an_adapter_and_attentions(model: Any, folder: Path, plain: Any, tmp_path: Path) -> None:
    """The worker gets the adapter's modules, and sends what is inside its layers, as the worker after it does."""
    adapted = get_peft_model(plain(folder), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    whole, before = plain(folder), model(prompt(9)).logits
    attentions = []
    for one in (whole, model):
        one.load_adapter(str(tmp_path))
        one.set_attn_implementation("eager")
        attentions.append(one(prompt(9), output_attentions=True).attentions)
    assert len(attentions[0]) == len(attentions[1]) == LAYERS
    assert all(map(torch.equal, *attentions))
    for one in (whole, model):
        one.set_attn_implementation("sdpa")
    expected = answer(whole, prompt(9)).sequences
    assert torch.equal(answer(model, prompt(9)).sequences, expected)
    process = psutil.Process(_stages(model)[0].process)
    process.kill()
    process.wait(30)
    assert torch.equal(answer(model, prompt(9)).sequences, expected)
    remove_adapter(model, "default")
    assert torch.equal(model(prompt(9)).logits, before)


def test_many_texts(model: Any, folder: Path, plain: Any) -> None:
    model.tokenizer = words(96)
    with Session(model, prefix_store=None) as session:
        texts = [prompt(7 + index)[0].tolist() for index in range(6)]
        found = [list(one.tokens) for one in session.generate(texts, max_new_tokens=5)]
    expected = plain(folder)
    for text, tokens in zip(texts, found, strict=True):
        ids = torch.tensor([text])
        theirs = expected.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, len(text) :]
        assert tokens == theirs.tolist()


def test_a_worker_that_is_killed_amid_a_text(model: Any, folder: Path, plain: Any) -> None:
    expected = answer(plain(folder), prompt(19), max_new_tokens=40).sequences
    killed = threading.Event()

    def kill_once() -> None:
        if count.value == 12 and not killed.is_set():
            killed.set()
            psutil.Process(_stages(model)[0].process).kill()

    count = _Counter(kill_once)
    assert torch.equal(answer(model, prompt(19), max_new_tokens=40, streamer=count).sequences, expected)
    assert killed.is_set()


class _Counter:
    """A streamer that calls `on_token` after each token."""

    def __init__(self, on_token: Any) -> None:
        self.value, self._on_token = 0, on_token

    def put(self, _: Any) -> None:
        self.value += 1
        self._on_token()

    def end(self) -> None:
        """Nothing is left to do."""


def test_a_machine_that_ends(model: Any, ray_cluster: LocalCluster, folder: Path, plain: Any) -> None:
    """Its layers go to the one that is left, which then holds less; a text under way goes on."""
    ids = prompt(19)
    expected = answer(plain(folder), ids, max_new_tokens=24).sequences
    last = ray_cluster.nodes[-1]
    ended = threading.Event()

    def end() -> None:
        if count.value == 8 and not ended.is_set():
            ended.set()
            processes = [stage.process for stage in _stages(model) if stage.name.endswith(last.node_id[:6])]
            assert len(processes) == 1
            ray_cluster.end(last)
            psutil.Process(processes[0]).kill()  # with its node: it would end some seconds later by itself

    count = _Counter(end)
    assert torch.equal(answer(model, ids, max_new_tokens=24, streamer=count).sequences, expected)
    assert ended.is_set()
    assert len({stage.name for stage in _stages(model)}) == 1


def test_nothing_is_left_after_close(model: Any, ray_cluster: LocalCluster) -> None:
    processes = [psutil.Process(stage.process) for stage in _stages(model)]
    model.close()
    _, left = psutil.wait_procs(processes, timeout=20)
    assert not left


def test_too_little_memory_says_what_is_missing(ray_cluster: LocalCluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "machines_of", lambda facts, _: [Machine(name=one.name, memory_bytes=9000) for one in facts])
    with pytest.raises(BudgetError, match="is the first, and keeps what stands around the layers"):
        AutoModel.from_pretrained(folder, **ON, cluster=ray_cluster.address)


def test_other_versions_are_refused(ray_cluster: LocalCluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rabbit_engine.cluster import machines

    monkeypatch.setattr(machines, "own_versions", lambda: {"torch": "1.0"})
    with pytest.raises(MachinesDifferError, match="torch"):
        AutoModel.from_pretrained(folder, **ON, cluster=ray_cluster.address)


def test_workers_compute_on_cpus(folder: Path) -> None:
    settings = read_settings({"device": "cuda:0", "max_memory": {0: "1GB"}}, planned=True)
    with pytest.raises(ConfigurationError, match='give device="cpu"'):
        clusters.load_on_cluster(folder, settings, "auto")


def test_no_token_travels(ray_cluster: LocalCluster, folder: Path, small_machines: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    def keep(_: Any, factory: Any) -> str:
        sent.append(pickle.dumps(factory.args[:-1]))
        raise BudgetError("enough seen")

    monkeypatch.setattr(WorkerHandle, "open", keep)
    with pytest.raises(BudgetError):
        AutoModel.from_pretrained(folder, **ON, cluster=ray_cluster.address, token="hf_secret")
    assert sent
    assert not any(b"hf_secret" in one for one in sent)


def test_errors_are_of_one_family() -> None:
    assert issubclass(StageLostError, ClusterError)
