"""Nodes of Ray in network namespaces, as benchmarks use them: addresses, rates, limits, kills, and nothing left behind.

Needs root, iproute2, and a kernel or container that allows namespaces and memory groups. Elsewhere a warning says what is
missing, and the tests are skipped; with RABBIT_NAMESPACES=1 they fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from cluster import network, nodes
from cluster.network import Link, switched
from cluster.nodes import NodesInNamespaces, Shape, cluster_of_nodes
from peers.memory_group import limited_group

SCRIPTS = str(Path(__file__).parents[1] / "scripts")
SERVE = """
import socket
with socket.create_server(("0.0.0.0", 7000)) as server:
    print("listening", flush=True)
    while True:
        with server.accept()[0] as connection:
            while connection.recv(2**16):
                pass
            connection.sendall(b"all")
"""
SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 7000), timeout=5) as connection:
    start = time.perf_counter()
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(3) == b"all"
    print(time.perf_counter() - start)
"""
DRIVER = """
import os, sys, ray
ray.init(log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
class Worker:
    def address(self):
        return ray.util.get_node_ip_address()

workers = [Worker.remote() for _ in range(2)]
print("at", *sorted(ray.get([worker.address.remote() for worker in workers])), flush=True)
sys.stdin.readline()
ends = []
for worker in workers:
    try:
        ends.append(ray.get(worker.address.remote()))
    except ray.exceptions.RayActorError:
        ends.append("dead")
print("at", *sorted(ends), flush=True)
"""
LEAVE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from cluster.network import Link, switched
with switched(f"{os.getpid()}.0", 1, Link()):
    print(f"{os.getpid()}.0", flush=True)
    os.kill(os.getpid(), 9)
"""


def missing() -> str:
    """What this machine lacks for the tests, if anything."""
    try:
        with switched(f"{os.getpid()}.t", 1, Link()), limited_group(f"rabbit-try-{os.getpid()}", 10**8):
            return ""
    except OSError as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    if why := missing():
        if os.environ.get("RABBIT_NAMESPACES"):
            pytest.fail(f"no network namespaces or memory groups here: {why}")
        warnings.warn(f"tests of nodes in namespaces do not run: {why}", stacklevel=1)
        pytest.skip(why)


@pytest.fixture(scope="module")
def cluster() -> Iterator[NodesInNamespaces]:
    with cluster_of_nodes(Shape(nodes=2, memory_bytes=1_500_000_000)) as running:
        yield running


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def told(lines: IO[str]) -> list[str]:
    """The addresses of the next line that is not Ray's."""
    return next(line.split()[1:] for line in lines if line.startswith("at "))


def test_a_cable_has_its_rate_and_other_switches_are_out_of_reach() -> None:
    with switched(f"{os.getpid()}.a", 2, Link(rate="80mbit")) as spaces, switched(f"{os.getpid()}.b", 1, Link()) as (other,):
        server = subprocess.Popen(spaces[1].joined(python(SERVE)), stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        send = python(SEND, spaces[1].address, "5000000")
        seconds = float(subprocess.run(spaces[0].joined(send), capture_output=True, check=True).stdout)
        assert 0.4 < seconds < 5  # 0.5 s, and half a megabyte at once
        assert subprocess.run(other.joined(send), capture_output=True, check=False).returncode
        assert subprocess.run(send, capture_output=True, check=False).returncode  # the host
        spaces[1].kill_processes()
        assert (server.wait(5), spaces[1].processes()) == (-9, [])


def fail_with(label: str, link: Link) -> None:
    with switched(label, 2, link) as spaces:
        subprocess.Popen(spaces[0].joined(["sleep", "60"]))
        raise KeyError(label)


@pytest.mark.parametrize(("rate", "error"), [("fast", OSError), ("1gbit", KeyError)], ids=["of tc", "of the test"])
def test_nothing_is_left_after_a_fault(rate: str, error: type[Exception]) -> None:
    label = f"{os.getpid()}.c"
    with pytest.raises(error):
        fail_with(label, Link(rate=rate))
    assert label not in network.labels()
    assert not list(Path("/var/run/netns").glob(f"rabbit-{label}-*"))


def test_what_a_killed_process_left_is_removed_by_the_next() -> None:
    killed = subprocess.run(python(LEAVE, SCRIPTS), capture_output=True, text=True, check=False)
    label = killed.stdout.strip()
    group = nodes.find_controller().root / f"rabbit-{label}-0"
    group.mkdir()
    assert (killed.returncode, label in network.labels()) == (-9, True)
    nodes.remove_leftovers()
    assert label not in network.labels()
    assert not group.exists()


def test_workers_run_on_both_nodes_within_their_memory_and_can_be_killed(cluster: NodesInNamespaces) -> None:
    head, other = cluster.nodes
    with cluster.open(python(DRIVER), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        assert told(driver.stdout) == [head.address, other.address]
        for node in cluster.nodes:
            (worker,) = node.workers()
            assert f"rabbit-{os.getpid()}." in Path(f"/proc/{worker}/cgroup").read_text()
        assert len(other.kill_workers()) == 1
        driver.stdin.write("on\n")
        driver.stdin.flush()
        assert told(driver.stdout) == [head.address, "dead"]


def test_a_node_that_is_killed_ends_with_all_its_processes(cluster: NodesInNamespaces) -> None:
    other = cluster.nodes[1]
    assert other.space.processes()
    other.kill()
    assert other.space.processes() == []
    assert cluster.nodes[0].space.processes()
