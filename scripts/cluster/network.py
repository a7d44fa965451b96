"""Network namespaces joined by a switch whose links have a rate and a delay. Linux; needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path("/var/run/netns")
_BURST = "512kb"
_QUEUE = "50ms"
_END_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The cable of one namespace: bits a second each way, as tc writes them, and the delay each way."""

    rate: str = "1gbit"
    delay_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace with one address. The switch is its alone: the host and other switches cannot reach it."""

    name: str
    address: str

    def joined(self, command: Sequence[str]) -> list[str]:
        """`command`, in this namespace. Unlike `ip netns exec` it leaves /sys mounted, where limits of memory are read."""
        return ["nsenter", f"--net={_FOLDER / self.name}", *command]

    def cut(self) -> None:
        """Take its cable out of the switch: what it sends or is sent is lost, and nobody is told."""
        _ip("link", "set", self._cable, "nomaster")

    def mend(self) -> None:
        """Put its cable back."""
        _ip("link", "set", self._cable, "master", f"rb{self._label}")

    @property
    def _label(self) -> str:
        return self.name.split("-")[1]

    @property
    def _cable(self) -> str:
        return f"rv{self._label}.{self.name.split('-')[2]}"

    def processes(self) -> list[int]:
        """The process ids in it, those of daemons included."""
        return [int(word) for word in _ip("netns", "pids", self.name).split()]

    def kill_processes(self) -> None:
        """Kill every process in it with SIGKILL and wait until all have ended. Raises TimeoutError if some do not."""
        deadline = time.monotonic() + _END_WITHIN_S
        while running := [process for process in self.processes() if not _has_ended(process)]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {running} of {self.name} are still running after SIGKILL")
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)


@contextlib.contextmanager
def switched(label: str, count: int, link: Link) -> Iterator[list[Namespace]]:
    """`count` namespaces on a switch of their own, removed at the end with all that runs in them.

    `label` distinguishes switches of this machine; up to 10 characters. Raises PermissionError if the machine or container
    forbids namespaces (it needs root, or CAP_SYS_ADMIN and CAP_NET_ADMIN), OSError for a rate or a delay that it cannot have.
    """
    bridge = f"rb{label}"
    with contextlib.ExitStack() as made:
        _ip("link", "add", bridge, "type", "bridge")
        made.callback(_ip, "link", "del", bridge)
        _ip("link", "set", bridge, "up")
        yield [made.enter_context(_plugged(label, index, bridge, link)) for index in range(count)]


@contextlib.contextmanager
def _plugged(label: str, index: int, bridge: str, link: Link) -> Iterator[Namespace]:
    space, outer = Namespace(f"rabbit-{label}-{index}", f"10.77.0.{11 + index}"), f"rv{label}.{index}"
    _ip("netns", "add", space.name)
    try:
        _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space.name)
        _ip("link", "set", outer, "master", bridge, "up")
        _ip("-n", space.name, "address", "add", f"{space.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", space.name, "link", "set", device, "up")
        _shape(["-n", space.name], "eth0", link, link.delay_ms)
        _shape([], outer, link, 0.0)
        yield space
    finally:
        space.kill_processes()
        _ip("netns", "del", space.name)


def _shape(inside: Sequence[str], device: str, link: Link, delay_ms: float) -> None:
    """What leaves `device` has the link's rate, after the delay if there is one."""
    parent = "root"
    if delay_ms:
        delay = ["root", "handle", "1:", "netem", "delay", f"{delay_ms}ms", "limit", "20000"]
        _run("tc", *inside, "qdisc", "add", "dev", device, *delay)
        parent = "parent 1:"
    limits = ["rate", link.rate, "burst", _BURST, "latency", _QUEUE]
    _run("tc", *inside, "qdisc", "add", "dev", device, *parent.split(), "tbf", *limits)


def remove_leftover(label: str) -> None:
    """Remove the switch `label` of a process that was killed before it could do so itself."""
    for folder in _FOLDER.glob(f"rabbit-{label}-*"):
        Namespace(folder.name, "").kill_processes()
        _ip("netns", "del", folder.name)
    if Path(f"/sys/class/net/rb{label}").exists():
        _ip("link", "del", f"rb{label}")


def labels() -> list[str]:
    """The labels of the switches that exist."""
    return [folder.name.removeprefix("rb") for folder in Path("/sys/class/net").glob("rb*") if (folder / "bridge").exists()]


def _has_ended(process: int) -> bool:
    """Whether it is gone, or a zombie that its parent has not waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        refused = "not permitted" in done.stderr or "Permission denied" in done.stderr
        raise (PermissionError if refused else OSError)(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout
