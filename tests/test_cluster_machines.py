"""Machines of a cluster: what each tells of itself, versions that differ, measured rates, links. Two nodes of Ray on this one."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from ray_token import use_ray_token
from typer.testing import CliRunner

from rabbit_engine.cli.app import app
from rabbit_engine.cluster import machines
from rabbit_engine.cluster.connection import connect
from rabbit_engine.cluster.machines import MachineFacts, answers_of, gather_facts, own_versions, require_same_versions
from rabbit_engine.cluster.measure import MachineLink, disk_name, measure_machines
from rabbit_engine.errors import ClusterError, MachinesDifferError

PLACE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_log_monitor": False}
OTHER = "99.0"
LOOK_ELSEWHERE = """
import sys
sys.modules.update(dict.fromkeys(("rabbit_engine", "torch")))  # neither can be imported
import ray.cloudpickle
told = ray.cloudpickle.loads(open(sys.argv[1], "rb").read())()
print(told["versions"]["rabbit_engine"], told["free_bytes"], told["authentication"])
"""


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The module, connected to two nodes; the second has another version of safetensors on its path."""
    packages = tmp_path_factory.mktemp("packages")
    metadata = packages / f"safetensors-{OTHER}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: safetensors\nVersion: {OTHER}\n")
    use_ray_token()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**PLACE, "include_dashboard": False})
    try:
        path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
        cluster.add_node(**PLACE, env_vars={"PYTHONPATH": path})
        yield connect(cluster.address)
    finally:
        connect(cluster.address).shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def facts(ray: ModuleType) -> tuple[MachineFacts, ...]:
    return gather_facts()


def test_machines_tell_their_facts_with_the_drivers_first(ray: ModuleType, facts: tuple[MachineFacts, ...]) -> None:
    assert [one.is_driver for one in facts] == [True, False]
    assert facts[0].node_id == ray.get_runtime_context().get_node_id()
    assert facts[0].versions == own_versions()
    for one in facts:
        assert (one.cores, one.authentication, one.kernel, one.address) == (1, True, facts[0].kernel, facts[0].address)
        assert one.free_bytes > 10**8
    assert facts[1].name == f"{facts[1].address}/{facts[1].node_id[:6]}" != facts[0].name
    assert re.match(rf"{facts[1].name} .*safetensors {OTHER}", str(facts[1]))


def test_a_version_that_differs_is_refused_and_named(facts: tuple[MachineFacts, ...]) -> None:
    require_same_versions(facts[:1])
    with pytest.raises(MachinesDifferError) as refused:
        require_same_versions(facts)
    found = str(refused.value)
    assert f"{facts[1].name} has safetensors {OTHER}, the driver {own_versions()['safetensors']}" in found
    assert found.count(" has ") == 1


def test_the_doctor_names_the_machine_that_differs_and_measures_the_others(
    ray: ModuleType, facts: tuple[MachineFacts, ...], tmp_path: Path
) -> None:
    (tmp_path / "weights").write_bytes(os.urandom(2**24))
    address = ray.get_runtime_context().gcs_address
    done = CliRunner().invoke(app, ["doctor", "--cluster", address, "--folder", str(tmp_path), "--quick", "--json"])
    assert done.exit_code == 1, done.output
    told = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert list(found) == ["cluster", "authentication", "versions", facts[0].name]
    assert found["cluster"]["value"].startswith(f"2 machines at {address}, Ray {ray.__version__}, on 1 kernel, ")
    assert found["authentication"]["status"] == "ok"
    assert f"{facts[1].name} has safetensors {OTHER}" in found["versions"]["value"]
    assert (told["can_run"], len(told["machines"]), len(told["measured"])) == (False, 2, 1)


def test_builds_for_other_hardware_are_the_same_version_and_missing_packages_are_not(facts: tuple[MachineFacts, ...]) -> None:
    one, own = facts[0], {"torch": "2.9.0+cpu", "rabbit_engine": "1.0"}
    require_same_versions([replace(one, versions={"torch": "2.9.0+cu128", "rabbit_engine": "1.0"})], own)
    with pytest.raises(MachinesDifferError, match=r"has rabbit_engine missing, the driver 1\.0"):
        require_same_versions([replace(one, versions={"torch": "2.9.0"})], own)
    with pytest.raises(MachinesDifferError, match=r"has torch 2\.9\.1, the driver 2\.9\.0\+cpu"):
        require_same_versions([replace(one, versions={"torch": "2.9.1", "rabbit_engine": "1.0"})], own)


def test_a_machine_without_this_package_still_tells(ray: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "task").write_bytes(ray.cloudpickle.dumps(machines._look_around()))
    command = [sys.executable, "-c", LOOK_ELSEWHERE, str(tmp_path / "task")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
    assert done.stdout.split() == ["missing", "0", "False"]


def test_every_machine_measures_its_disk_products_and_link(facts: tuple[MachineFacts, ...], tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(os.urandom(2**24))
    driver, other = measure_machines(facts, str(tmp_path / "not" / "yet"), 2**24)
    assert driver.link is None
    assert other.link.round_trip_s > 0
    assert other.link.rate > 1e6
    for machine in (driver, other):
        assert (machine.rates.folder, machine.rates.disk_problem) == (str(tmp_path), "")
        assert machine.rates.disk == disk_name(tmp_path, facts[0].kernel)
        planned = machine.as_planned()
        assert (planned.name, planned.memory_bytes) == (machine.facts.name, machine.facts.free_bytes)
        assert planned.disk_rate == machine.rates.disk_rate > 1e6
        assert planned.seconds_per_byte == 1 / machine.rates.compute_rate < 1e-6
    assert (driver.as_planned().link_rate, driver.as_planned(5).memory_bytes) == (math.inf, 5)
    assert (other.as_planned().link_rate, other.as_planned().link_latency_s) == (other.link.rate, other.link.latency_s)
    assert "link to the driver: round trip of 16 KB" in str(other)
    assert "link" not in str(driver)


def test_a_disk_that_cannot_be_read_is_told(facts: tuple[MachineFacts, ...]) -> None:
    (measured,) = measure_machines(facts[:1], "/proc", 2**24)
    assert measured.rates.disk_rate == 0 == measured.as_planned().disk_rate
    assert "not measured (" in str(measured)


def test_latency_is_half_a_round_trip_less_the_bytes() -> None:
    assert MachineLink(round_trip_s=0.004, rate=16_384_000).latency_s == pytest.approx(0.001)
    assert MachineLink(round_trip_s=0.001, rate=16_384_000).latency_s == 0


def test_a_machine_that_does_not_answer_or_fails_is_named(ray: ModuleType) -> None:
    with pytest.raises(ClusterError, match=r"machine slow did not answer within 0\.1 s"):
        answers_of({"slow": ray.remote(num_cpus=0)(lambda: time.sleep(5)).remote()}, 0.1)
    with pytest.raises(ClusterError, match=r"machine odd could not answer: .*invalid literal"):
        answers_of({"odd": ray.remote(num_cpus=0)(lambda: int("x")).remote()}, 60)
