"""A Ray cluster of two to four nodes on this machine, in network namespaces, with shaped links and limits of memory.

    python scripts/cluster/nodes.py --nodes 4 --memory 2.2GB --rate 1gbit -- COMMAND...

runs COMMAND as the driver: in the namespace and the memory of the head, with the cluster's address in RAY_ADDRESS and its token
in RAY_AUTH_TOKEN_PATH. Its exit code is that of the command; nodes, links and groups are gone when it returns. Every node has
an address, a cable, a memory cgroup and a temporary folder of its own; Ray's token authentication is on; there is no dashboard.
Linux, root. In a test or a script:

    with cluster_of_nodes(Shape(nodes=2, memory_bytes=1_500_000_000)) as cluster:
        cluster.run([sys.executable, "driver.py"], check=True)
        cluster.nodes[1].kill()
        cluster.nodes[1].start()
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from peers.memory_group import MemoryGroup, ReadLimit, find_controller, limited_group

from cluster.network import Link, Namespace, labels, remove_leftover, switched
from rabbit_engine.utils.sizes import parse_bytes

PORT, CLIENT_PORT, AGENT_PORT = 6379, 10001, 8790
MOST_NODES = 8
_START_WITHIN_S = 240.0
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_AGENTS = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What each node has. Its memory is that of all its processes, Ray's own included; None does not limit it. With a limit of
    memory, a disk of its own may be had too: `read_limit` is what it reads from it."""

    nodes: int = 2
    memory_bytes: int | None = None
    read_limit: ReadLimit | None = None
    link: Link = field(default_factory=Link)
    cpus: int = 1
    object_store_bytes: int = 100_000_000
    client_server: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MOST_NODES:
            raise ValueError(f"nodes={self.nodes}: a cluster has 1 to {MOST_NODES}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One Ray node; the first of a cluster is its head."""

    index: int
    space: Namespace
    group: MemoryGroup | None
    head: str
    folder: Path
    shape: Shape
    environment: Mapping[str, str]

    @property
    def address(self) -> str:
        """The address of its end of the cable."""
        return self.space.address

    def joined(self, command: Sequence[str]) -> list[str]:
        """`command`, in its namespace and memory."""
        return self.space.joined(self.group.joined(command) if self.group else command)

    def start(self) -> None:
        """Start its Ray processes. Raises RuntimeError with Ray's words if they do not start."""
        command = self.joined([*_RAY, "start", *self._place(), *self._limits()])
        out = self.folder / "start.log"
        with out.open("w") as log:  # a pipe would stay open in the daemons
            done = subprocess.run(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=_START_WITHIN_S,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"node {self.index} did not start: {out.read_text().strip()[-2000:]}")

    def _place(self) -> list[str]:
        own = f"--temp-dir={self.folder / 'ray'}"  # nodes that start at once in one folder choose the same names of sockets
        if self.index:
            return [f"--address={self.head}", own]
        client = (
            [f"--ray-client-server-port={CLIENT_PORT}", f"--runtime-env-agent-port={AGENT_PORT}"]
            if self.shape.client_server
            else []
        )
        return ["--head", f"--port={PORT}", "--include-dashboard=false", own, *client]

    def _limits(self) -> list[str]:
        """Ray counts the machine's memory, not that of the group; one node of several does not have it all."""
        memory = [] if self.shape.memory_bytes is None else [f"--memory={self.shape.memory_bytes}"]
        store = f"--object-store-memory={self.shape.object_store_bytes}"
        return [
            f"--node-ip-address={self.address}",
            f"--num-cpus={self.shape.cpus}",
            store,
            *memory,
            "--include-log-monitor=false",
        ]

    def workers(self) -> list[int]:
        """Process ids of its Ray workers: actors, tasks, and those that wait for one."""
        return [process for process in self.space.processes() if _is_worker(process)]

    def kill_workers(self) -> list[int]:
        """Kill its workers with SIGKILL; the node stays in the cluster. Returns their process ids."""
        found = self.workers()
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return found

    def kill(self) -> None:
        """Kill all that runs on it with SIGKILL, as a power cut does; on the head the driver too."""
        self.space.kill_processes()


@dataclass(frozen=True, slots=True)
class NodesInNamespaces:
    """A running cluster, in the order of its addresses."""

    nodes: tuple[Node, ...]

    @property
    def address(self) -> str:
        """What `ray.init(address=...)` takes."""
        return self.nodes[0].head

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run the driver in the head's namespace and memory; `options` are those of subprocess.run."""
        return subprocess.run(self.nodes[0].joined(command), **self._with_environment(options))

    def open(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a driver in the head's namespace and memory; `options` are those of subprocess.Popen."""
        return subprocess.Popen(self.nodes[0].joined(command), **self._with_environment(options))

    def _with_environment(self, options: dict[str, Any]) -> dict[str, Any]:
        return options | {"env": {**self.nodes[0].environment, **options.get("env", {})}}


@contextlib.contextmanager
def cluster_of_nodes(shape: Shape, environment: Mapping[str, str] | None = None) -> Iterator[NodesInNamespaces]:
    """Start a cluster, and remove all of it at the end. `environment` adds to that of every node and driver.

    Raises PermissionError where namespaces or groups of memory cannot be made.
    """
    remove_leftovers()
    label = f"{os.getpid()}.{next(_numbers) % 100}"
    with contextlib.ExitStack() as made:
        folder = _folder_of(label)
        made.callback(shutil.rmtree, folder, ignore_errors=True)
        variables = _environment(folder, environment or {})
        groups = [_group(made, label, index, shape) for index in range(shape.nodes)]
        spaces = made.enter_context(switched(label, shape.nodes, shape.link))
        head = f"{spaces[0].address}:{PORT}"
        nodes = [
            Node(index=i, space=space, group=group, head=head, folder=_made(folder / str(i)), shape=shape, environment=variables)
            for i, (space, group) in enumerate(zip(spaces, groups, strict=True))
        ]
        nodes[0].start()
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.start, nodes[1:]))
        yield NodesInNamespaces(tuple(nodes))


def remove_leftovers() -> None:
    """Remove the clusters of processes that were killed before they could remove them."""
    for label in labels():
        owner = label.partition(".")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            remove_leftover(label)
            shutil.rmtree(_path_of(label), ignore_errors=True)
            for group in find_controller().root.glob(f"rabbit-{label}-*"):
                group.rmdir()


def _path_of(label: str) -> Path:
    return Path(tempfile.gettempdir()) / f"rn{label}"  # short: sockets below it have 107 characters at most


def _folder_of(label: str) -> Path:
    folder = _path_of(label)
    folder.mkdir(mode=0o700)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _group(made: contextlib.ExitStack, label: str, index: int, shape: Shape) -> MemoryGroup | None:
    if shape.memory_bytes is None:
        return None
    return made.enter_context(limited_group(f"rabbit-{label}-{index}", shape.memory_bytes, shape.read_limit))


def _environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """This process's, with the address and the token of the cluster."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_TOKEN", "RAY_TMPDIR")}
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**kept, **own, "RAY_ADDRESS": f"10.77.0.11:{PORT}", **more}


def _is_worker(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    first, *rest = command.split(b"\0")
    named = first.startswith(b"ray::") and first.strip() not in _AGENTS
    return named or (rest[:1] != [] and any(word.endswith(b"default_worker.py") for word in rest[:2]))


def main() -> int:
    """Start the cluster, run the command, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--memory", type=parse_bytes, help="of each node, such as 2.2GB; not limited by default")
    parser.add_argument("--rate", default="1gbit", help="of each node's cable, each way, as tc writes it")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of each node's cable, each way (needs the kernel's netem)")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--object-store", type=parse_bytes, default=100_000_000)
    parser.add_argument("--client-server", action="store_true", help=f"also serve ray:// on port {CLIENT_PORT} of the head")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    shape = Shape(
        nodes=given.nodes,
        memory_bytes=given.memory,
        link=Link(rate=given.rate, delay_ms=given.delay_ms),
        cpus=given.cpus,
        object_store_bytes=given.object_store,
        client_server=given.client_server,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with cluster_of_nodes(shape) as cluster:
        return int(cluster.run(given.command, check=False).returncode)


if __name__ == "__main__":
    sys.exit(main())
