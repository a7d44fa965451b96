"""`rabbit serve --cluster` where a machine lacks the model; one Ray of two machines, each with its own Hub cache."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import gguf_files
import httpx
import psutil
import pytest
from fake_hub import COMMIT
from local_cluster import LocalCluster, local_cluster
from tiny import words
from waiting import wait_until

from rabbit_engine import AutoModelForCausalLM, errors
from rabbit_engine.checkpoints import execute
from rabbit_engine.cli.loading import Loading
from rabbit_engine.cli.offered import Offered
from rabbit_engine.cluster import connect
from rabbit_engine.cluster.description import describe, extents_of
from rabbit_engine.cluster.sending import DriverFiles, LateChunks, Sender
from rabbit_engine.cluster.stored import stored_copies
from rabbit_engine.model.sent_files import SentFiles, digest, located, own_model

NAME = "someone/tiny"
CPU = {"device": "cpu"}
ASKED = {"model": "tiny", "prompt": [3, 5, 7], "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = families.save("llama", tmp_path_factory.mktemp("model") / "tiny")
    words(96).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, Path]:
    """Those of the driver's machine, which has the model, and of the other, which does not."""
    driver, other = tmp_path_factory.mktemp("driver"), tmp_path_factory.mktemp("other")
    repo = driver / "hub" / f"models--{NAME.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    return driver, other


def environment_of(home: Path) -> dict[str, str]:
    paths = f"{Path(__file__).parent.parent}{os.pathsep}{Path(__file__).parent}"
    return {"HF_HOME": str(home), "RABBIT_ENGINE_CACHE": str(home / "own"), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def ray_cluster(homes: tuple[Path, Path]) -> Iterator[LocalCluster]:
    with local_cluster(environments=[environment_of(home) for home in homes]) as cluster:
        yield cluster


def replicas(home: Path) -> list[psutil.Process]:
    """Those on the machine with that home."""
    found = psutil.process_iter(["name", "environ"])
    mine = [process for process in found if (process.info["environ"] or {}).get("HF_HOME") == str(home)]
    return [process for process in mine if process.info["name"].startswith("ray::ServeReplica")]


def test_a_replica_fetches_the_model_and_another_does_after_the_command_has_ended(
    ray_cluster: LocalCluster, homes: tuple[Path, Path]
) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [sys.executable, "-m", "rabbit_engine", "serve", f"tiny={NAME}", "--cluster", ray_cluster.address, "--port", port]
    command += ["--replicas", "2", "--replica-cpus", "1", "--device", "cpu", "-m", "100MB", "--prefix-store", "off"]
    environment = {**os.environ, **environment_of(homes[0])}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    copies = homes[1] / "own" / "copies"
    (copy,) = stored_copies(copies)
    assert (copy.name, copy.in_use, stored_copies(homes[0] / "own" / "copies")) == (NAME, True, [])
    (before,) = replicas(homes[1])
    shutil.rmtree(copies)  # as a machine that joins would be
    before.kill()
    wait_until(lambda: any(process.pid != before.pid for process in replicas(homes[1])) and bool(stored_copies(copies)), 240)
    answers = [httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=ASKED, timeout=120) for _ in range(6)]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


def test_what_is_sent_no_more_says_why_and_what_to_do(ray_cluster: LocalCluster, folder: Path, tmp_path: Path) -> None:
    ray = connect(ray_cluster.address)
    own = own_model(str(shutil.copytree(folder, tmp_path / "tiny")), CPU)
    assert own is not None
    there = describe(execute(own, progress=False)[0])
    row = next(row for row in there.files if row.is_weights)
    here = ray.get_runtime_context().get_node_id()
    assert len(LateChunks(there, Sender("nobody", here))(row.area, row.name, 0, 8).data) == 8
    with pytest.raises(errors.ClusterError, match=rf"does not have {there.name}, and .* sends it no more \(it left the cluster"):
        LateChunks(there, Sender("nobody", "a" * 56))(row.area, row.name, 0, 8)
    with Path(row.path).open("r+b") as file:
        file.seek(-8, 2)
        file.write(bytes(8))
    with pytest.raises(errors.ClusterError, match=rf"\({row.path} has changed\): put the model at the same place on"):
        LateChunks(there, Sender("nobody", here))(row.area, row.name, 0, 8)


def sent_by(model: Path, **loading: Any) -> SentFiles:
    """The files of a model that this machine lacks, and a driver that has them."""
    own = own_model(str(model), {**CPU, **loading})
    assert own is not None
    source = execute(own, progress=False)[0]
    here = describe(source)
    away = replace(here, name=f"/nowhere/{model.name}", driver="pc1")
    return SentFiles(digest(own.source), away, extents_of(source, list(source.entries)), lambda: DriverFiles(here).read)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RABBIT_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_that_is_here_is_read_here_unless_it_is_another(folder: Path, tmp_path: Path, cache: Path) -> None:
    sent = sent_by(folder)
    assert located(str(folder), CPU, sent) == (str(folder), {})
    other = families.save("llama", tmp_path / "tiny", num_hidden_layers=3)
    with pytest.raises(errors.MachinesDifferError, match=rf"{other} on {socket.gethostname()} is not that of pc1: copy"):
        located(str(other), CPU, sent)
    at_home = replace(sent, description=replace(sent.description, driver=socket.gethostname()))
    with pytest.raises(errors.MachinesDifferError, match="has changed since the command was given: give it again"):
        located(str(other), CPU, at_home)
    assert not stored_copies(cache / "copies")


def test_a_machine_that_has_its_copy_needs_nobody(folder: Path, cache: Path) -> None:
    sent = sent_by(folder)
    first = located("/nowhere/tiny", CPU, sent)
    assert Path(first[0]).is_relative_to(cache)
    gone = replace(sent, opening=lambda: LateChunks(sent.description, Sender("nobody", "a" * 56)))
    assert located("/nowhere/tiny", CPU, gone) == first


def test_a_gguf_file_is_fetched_too(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "driver").mkdir()
    file = tmp_path / "driver" / "tiny.gguf"
    gguf_files.write(file, "llama")
    name, more = located("/nowhere/driver/tiny.gguf", CPU, sent_by(file))
    assert Path(name).is_relative_to(cache)
    with AutoModelForCausalLM.from_pretrained(name, **CPU, **more) as model:
        assert model.config.model_type == "llama"


def test_a_replica_loads_and_describes_what_it_fetched(folder: Path, cache: Path) -> None:
    offered = Offered({"tiny": "/nowhere/tiny"}, Loading(**CPU), {}, {}, "off")
    with offered._located({"tiny": sent_by(folder)}).host() as host:
        assert len(host.loaded) == 1
        assert host.descriptions._describe is not None
        assert host.descriptions._describe("tiny").model_type == "llama"
    assert len(stored_copies(cache / "copies")) == 1
    with pytest.raises(errors.CheckpointNotFoundError, match=rf"^{socket.gethostname()}: .*No files were sent to it"):
        offered.host_on({}).__enter__()
