"""The copies of models' files that this machine has fetched: what they take, which are in use, and room for another.

Two kinds of lock files lie next to a copy's folder: one is held by whoever changes the copy, the others by the processes that
use it, each until it ends. Users come and copies go only under the first.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rabbit_engine.errors import ClusterError, NotEnoughDiskError
from rabbit_engine.storage.cached import VARIABLE, cache_folder
from rabbit_engine.storage.jsonvalues import parse
from rabbit_engine.storage.tensorfiles import written_whole
from rabbit_engine.utils.sizes import format_bytes

logger = logging.getLogger(__name__)

_NOTE = ".rabbit_copy.json"
_USER = "using"
_BLOCK_BYTES = 512

_used: dict[Path, FileLock] = {}
"""The locks that this process holds as a user; they end with it."""


@dataclass(frozen=True, slots=True)
class StoredCopy:
    """A copy: the model's `name` on the machine `driver` that it was fetched from, and the bytes that it takes on the disk."""

    name: str
    driver: str
    folder: Path
    nbytes: int
    last_used: float
    in_use: bool


def copies_folder() -> Path | None:
    """Where copies are; None if the user of this machine wants none."""
    cache = cache_folder()
    return None if cache is None else cache / "copies"


def stored_copies(folder: Path) -> list[StoredCopy]:
    """The copies in a folder, the one that was used last first."""
    if not folder.is_dir():
        return []
    found = [_described(copy) for copy in folder.iterdir() if copy.is_dir() and not copy.name.startswith(".")]
    return sorted(found, key=lambda copy: copy.last_used, reverse=True)


def delete_copy(copy: StoredCopy) -> bool:
    """Delete a copy, unless it is in use; whether it was deleted. Raises ClusterError if it cannot be."""
    with _changing_at_once(copy.folder) as is_mine:
        if not is_mine or _has_users(copy.folder):
            return False
        try:
            shutil.rmtree(copy.folder)
        except FileNotFoundError:
            return True
        except OSError as error:
            raise ClusterError(f"{copy.folder} cannot be deleted ({error.strerror or error})") from error
    return True


def make_room(folder: Path, needed: int, task: str) -> None:
    """See to it that the disk of the copy `folder` has `needed` bytes free: delete other copies that nobody uses, those unused
    longest first. Raises NotEnoughDiskError, with nothing deleted, if all of them are not enough."""
    free = _free(folder)
    if free >= needed:
        return
    others = [copy for copy in stored_copies(folder.parent) if copy.folder != folder]
    unused = sorted((copy for copy in others if not copy.in_use), key=lambda copy: copy.last_used)
    if free + sum(copy.nbytes for copy in unused) >= needed:
        for copy in unused:
            if delete_copy(copy):
                logger.warning("deleted the copy of %s, %s, unused since %s", copy.name, format_bytes(copy.nbytes), _day(copy))
            if (free := _free(folder)) >= needed:
                return
    kept = sum(copy.nbytes for copy in others)
    besides = f", and other copies take {format_bytes(kept)} there, of which {_count(others)} in use" if others else ""
    raise NotEnoughDiskError(
        f"{task} needs {format_bytes(needed)} in {folder}, {format_bytes(free)} are free{besides}: free some, or name another "
        f"folder with {VARIABLE} on {socket.gethostname()}"
    )


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Be the only one that changes the copy `folder`; waits for another."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process is fetching into %s: waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def use(folder: Path, name: str, driver: str) -> None:
    """Note that this process uses the copy until it ends. Call it while `changing`."""
    if folder not in _used:
        lock = FileLock(folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.{_USER}"))
        lock.acquire(timeout=0)
        _used[folder] = lock
    with written_whole(folder / _NOTE) as file:
        file.write(json.dumps({"name": name, "driver": driver}).encode())


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f".{folder.name}.lock"))


@contextmanager
def _changing_at_once(folder: Path) -> Iterator[bool]:
    """Be the only one that changes the copy, if nobody else does; whether it is so."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _has_users(folder: Path) -> bool:
    """Whether a process uses the copy. Deletes what those that were killed left."""
    found = False
    for path in folder.parent.glob(f".{folder.name}.*.{_USER}"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            found = True
        else:
            lock.release()
            path.unlink(missing_ok=True)
    return found


def _described(copy: Path) -> StoredCopy:
    with _changing_at_once(copy) as is_mine:
        in_use = not is_mine or _has_users(copy)
    note = _note(copy)
    named = {key: value for key in ("name", "driver") if isinstance(value := note.get(key), str)}
    used = (copy / _NOTE if note else copy).stat().st_mtime
    return StoredCopy(named.get("name", copy.name), named.get("driver", ""), copy, _bytes_on_disk(copy), used, in_use)


def _note(copy: Path) -> dict[str, Any]:
    try:
        found = parse((copy / _NOTE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _bytes_on_disk(folder: Path) -> int:
    """Copies have holes."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(getattr(one, "st_blocks", -(-one.st_size // _BLOCK_BYTES)) * _BLOCK_BYTES for one in stats)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _day(copy: StoredCopy) -> str:
    return datetime.fromtimestamp(copy.last_used).astimezone().strftime("%Y-%m-%d")


def _count(copies: list[StoredCopy]) -> str:
    return format_bytes(sum(copy.nbytes for copy in copies if copy.in_use))
