"""A cgroup (v1 or v2) that limits the memory of one process, page cache included, and how fast it reads a disk. Needs root."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_JOIN_THEN_RUN = 'for group in $0; do echo $$ > "$group" || exit; done; exec "$@"'
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
    disks: Path
    read_limit: str
    read_line: str


V1 = Controller(
    version="cgroup v1",
    root=Path("/sys/fs/cgroup/memory"),
    limit="memory.limit_in_bytes",
    with_swap="memory.memsw.limit_in_bytes",
    swap_is_added=True,
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
    disks=Path("/sys/fs/cgroup/blkio"),
    read_limit="blkio.throttle.read_bps_device",
    read_line="{disk} {rate}",
)
V2 = Controller(
    version="cgroup v2",
    root=Path("/sys/fs/cgroup"),
    limit="memory.max",
    with_swap="memory.swap.max",
    swap_is_added=False,
    peak="memory.peak",
    events="memory.events",
    disks=Path("/sys/fs/cgroup"),
    read_limit="io.max",
    read_line="{disk} rbps={rate}",
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

    @property
    def disk_folder(self) -> Path:
        """The folder of the limits on disks; in version 2 that of everything."""
        return self.controller.disks / self.folder.name

    def joined(self, command: Sequence[str]) -> list[str]:
        """`command`, in this group from its first instruction."""
        groups = {self.folder, self.disk_folder} if self.disk_folder.is_dir() else {self.folder}
        return ["sh", "-c", _JOIN_THEN_RUN, " ".join(str(folder / "cgroup.procs") for folder in groups), *command]

    def peak_bytes(self) -> int | None:
        """The group's peak memory, page cache included; None on kernels that do not report it."""
        path = self.folder / self.controller.peak
        return int(path.read_text()) if path.exists() else None

    def oom_kills(self) -> int:
        """The number of processes that the kernel killed here because memory ran out."""
        pairs = (line.split() for line in (self.folder / self.controller.events).read_text().splitlines())
        return next(int(count) for name, count in pairs if name == "oom_kill")


@dataclass(frozen=True, slots=True)
class ReadLimit:
    """At most `rate` bytes a second are read from the disk that holds `path`."""

    path: Path
    rate: int

    @property
    def disk(self) -> str:
        """Its numbers, as `254:0`; those of the whole disk for a partition."""
        number = self.path.stat().st_dev
        entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
        whole = entry.parent if (entry / "partition").exists() else entry
        return (whole / "dev").read_text().strip()


@contextlib.contextmanager
def limited_group(name: str, limit_bytes: int, read_limit: ReadLimit | None = None) -> Iterator[MemoryGroup]:
    """A new group of `limit_bytes` without swap, removed at the end. Raises PermissionError unless run as root."""
    controller = find_controller()
    if controller is V2:
        _hand_down(V2.root / "cgroup.subtree_control", ["memory", *(["io"] if read_limit else [])])
    group = MemoryGroup(controller, controller.root / name)
    group.folder.mkdir()
    try:
        (group.folder / controller.limit).write_text(str(limit_bytes))
        swap = group.folder / controller.with_swap
        if swap.exists():
            swap.write_text(str(limit_bytes if controller.swap_is_added else 0))
        if read_limit is not None:
            group.disk_folder.mkdir(exist_ok=True)
            line = controller.read_line.format(disk=read_limit.disk, rate=read_limit.rate)
            (group.disk_folder / controller.read_limit).write_text(line)
        yield group
    finally:
        for folder in {group.folder, group.disk_folder}:
            _remove(folder)


def _hand_down(subtree_control: Path, controllers: Sequence[str]) -> None:
    """A v2 group can have a limit only if its parent group enables its controller; most systems already do."""
    for name in controllers:
        if name not in subtree_control.read_text().split():
            subtree_control.write_text(f"+{name}")


def _remove(folder: Path) -> None:
    """A group is busy for a moment after its last process: try again until `_REMOVE_WITHIN_S` have passed."""
    deadline = time.monotonic() + _REMOVE_WITHIN_S
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
