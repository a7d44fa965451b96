"""A cgroup (v1 or v2) that limits the memory of one process, including the page cache. Needs root."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_JOIN_THEN_RUN = 'echo $$ > "$0" && exec "$@"'
_REMOVE_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Controller:
    """The mount point of the memory controller, and the names of its files."""

    version: str
    root: Path
    limit: str
    with_swap: str
    swap_is_added: bool
    peak: str
    events: str


V1 = Controller(
    version="cgroup v1",
    root=Path("/sys/fs/cgroup/memory"),
    limit="memory.limit_in_bytes",
    with_swap="memory.memsw.limit_in_bytes",
    swap_is_added=True,
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
)
V2 = Controller(
    version="cgroup v2",
    root=Path("/sys/fs/cgroup"),
    limit="memory.max",
    with_swap="memory.swap.max",
    swap_is_added=False,
    peak="memory.peak",
    events="memory.events",
)


def find_controller() -> Controller:
    """The version whose memory controller is mounted. Raises FileNotFoundError if none is."""
    if (V1.root / V1.limit).exists():
        return V1
    controllers = V2.root / "cgroup.controllers"
    if controllers.exists() and "memory" in controllers.read_text().split():
        return V2
    raise FileNotFoundError(
        f"no memory controller in {V1.root} (v1) or {controllers} (v2): run as root on a system with cgroups mounted"
    )


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """An existing group; `limited_group` creates one."""

    controller: Controller
    folder: Path

    def joined(self, command: Sequence[str]) -> list[str]:
        """`command`, in this group from its first instruction."""
        return ["sh", "-c", _JOIN_THEN_RUN, str(self.folder / "cgroup.procs"), *command]

    def peak_bytes(self) -> int | None:
        """The group's peak memory, page cache included; None on kernels that do not report it."""
        path = self.folder / self.controller.peak
        return int(path.read_text()) if path.exists() else None

    def oom_kills(self) -> int:
        """The number of processes that the kernel killed here because memory ran out."""
        pairs = (line.split() for line in (self.folder / self.controller.events).read_text().splitlines())
        return next(int(count) for name, count in pairs if name == "oom_kill")


@contextlib.contextmanager
def limited_group(name: str, limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new group of `limit_bytes` without swap, removed at the end. Raises PermissionError unless run as root."""
    controller = find_controller()
    if controller is V2:
        _hand_down_memory(V2.root / "cgroup.subtree_control")
    group = MemoryGroup(controller, controller.root / name)
    group.folder.mkdir()
    try:
        (group.folder / controller.limit).write_text(str(limit_bytes))
        swap = group.folder / controller.with_swap
        if swap.exists():
            swap.write_text(str(limit_bytes if controller.swap_is_added else 0))
        yield group
    finally:
        _remove(group.folder)


def _hand_down_memory(subtree_control: Path) -> None:
    """A v2 group can have a memory limit only if its parent group enables it; most systems already do."""
    if "memory" not in subtree_control.read_text().split():
        subtree_control.write_text("+memory")


def _remove(folder: Path) -> None:
    """A group is busy for a moment after its last process: try again until `_REMOVE_WITHIN_S` have passed."""
    deadline = time.monotonic() + _REMOVE_WITHIN_S
    while True:
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
