"""The files of a prefix store, which processes share: one lock file, one folder a space, one file a block.

lock, total, cleared      the lock; the bytes stored, or more; a word that changes with each `clear`: none of a text
writing/                  files under way, of the process that has the lock: anything else in it is left over from a kill
<space>/space.json        the label and the identity of a model
<space>/<block>           see keys.py
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from rabbit_engine.errors import PrefixStoreError, RabbitError, first_line
from rabbit_engine.prefixes.blockfile import PRIVATE, BlockHeader, block_file_bytes, read_block_header, write_block
from rabbit_engine.prefixes.eviction import BlockFile, choose_victims
from rabbit_engine.prefixes.keys import BlockKey, is_space, read_file_name
from rabbit_engine.storage.jsonvalues import Fields, parse
from rabbit_engine.storage.tensorfiles import written_whole

_PRIVATE_FOLDER = 0o700
_ABOUT = "space.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOCK_S = 60.0
"""How long to wait for another process, which has the lock while it writes a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """The blocks of one model in a store. `last_used` is in seconds since 1970."""

    space: str
    model: str
    identity: Mapping[str, str] = field(default_factory=dict)
    blocks: int = 0
    tokens: int = 0
    nbytes: int = 0
    last_used: float = 0.0


class StoreFolder:
    """The folder of a store with at most `max_bytes` of blocks. Nothing is created before a block is offered."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._scratch = path / "writing"

    def clean(self) -> None:
        """Delete what killed processes left, unless a block is being written now."""
        if self._scratch.is_dir():
            with contextlib.suppress(OSError), self._locked(0.0):
                pass

    def path_of(self, key: BlockKey) -> Path:
        """Where the block is, if it is stored."""
        return self.path / key.space / key.file

    def has(self, key: BlockKey) -> bool:
        """Whether there is a file for the block."""
        return os.path.lexists(self.path_of(key))

    def touch(self, key: BlockKey) -> bool:
        """Note that the block, and with it those before it, was used now; False if there is none."""
        try:
            os.utime(self.path_of(key))
        except FileNotFoundError:
            return False
        except OSError:  # a folder that may only be read
            return self.has(key)
        return True

    def read_header(self, key: BlockKey) -> BlockHeader:
        """The header of a stored block, compared with the key. Raises what `read_block_header` raises."""
        return read_block_header(self.path_of(key), key)

    def discard(self, key: BlockKey, inode: int | None = None) -> bool:
        """Delete a block; with an `inode`, only if it was not replaced since. False if it cannot be deleted."""
        path = self.path_of(key)
        try:
            if inode is None or path.stat().st_ino == inode:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def clearing(self) -> str:
        """A word that changes with each `clear`, by any process. Creates the folder, in which `clear` leaves it."""
        try:
            self.path.mkdir(mode=_PRIVATE_FOLDER, parents=True, exist_ok=True)
            return (self.path / "cleared").read_text(encoding="ascii")
        except (OSError, ValueError):
            return ""

    def holds(self, key: BlockKey, names: Collection[str]) -> bool:
        """Whether the block is stored with at least these tensors; then it counts as used now."""
        if not self.has(key):
            return False
        try:
            stored = self.read_header(key).tensors
        except RabbitError:
            return False
        return stored.keys() >= set(names) and self.touch(key)

    def store(self, key: BlockKey, tensors: Mapping[str, torch.Tensor], about: str, clearing: str) -> None:
        """Write a block, after the least recently used ones were deleted to make room for it; `about` is for the space's file.

        On a full disk they make room too. Not if the store was cleared since the block was offered, if it is stored or the block
        before it is not, or if there is no room. Raises OSError, or RabbitError for a lock that another process does not release.
        """
        with self._locked(_LOCK_S):
            reachable = key.index == 0 or os.path.lexists(self.path / key.space / key.before)
            if not reachable or self.clearing() != clearing or self.holds(key, tensors):
                return
            try:
                self._put(key, tensors, about)
            except OSError as error:
                if error.errno not in _FULL or not self._put(key, tensors, about, is_full=True):
                    raise

    def _put(self, key: BlockKey, tensors: Mapping[str, torch.Tensor], about: str, *, is_full: bool = False) -> bool:
        """Write a block; False if there is no room for it."""
        if not self._make_room(key, block_file_bytes(key, tensors), is_full=is_full):
            return False
        self._describe(key.space, about)
        write_block(self.path_of(key), self._scratch / "block", key, tensors)
        return True

    def models(self) -> list[StoredModel]:
        """What is stored, by model, the last used first."""
        found: dict[str, list[BlockFile]] = {}
        for file in self._files():
            found.setdefault(file.space, []).append(file)
        models = [self._model(space, files) for space, files in found.items()]
        return sorted(models, key=lambda model: -model.last_used)

    def clear(self, spaces: Collection[str] | None = None) -> None:
        """Delete the blocks of all spaces, or of these, with files under way. Raises PrefixStoreError for what remains."""
        if not self.path.is_dir():
            return
        try:
            with self._locked(_LOCK_S):
                _delete(self.path / "total")
                for space in self._spaces() if spaces is None else spaces:
                    self._delete_space(space)
                _write_small(self.path / "cleared", secrets.token_hex(8))  # last: the disk may have been full
        except PrefixStoreError:
            raise
        except OSError as error:
            raise PrefixStoreError(f"{self.path} cannot be cleared ({first_line(error)}): delete the folder yourself") from error

    @contextmanager
    def _locked(self, timeout_s: float) -> Iterator[None]:
        """The lock of the folder, which is created; files that nobody writes any more are deleted."""
        self.path.mkdir(mode=_PRIVATE_FOLDER, parents=True, exist_ok=True)
        lock = FileLock(self.path / "lock", timeout=timeout_s, mode=PRIVATE)
        try:
            lock.acquire()
        except Timeout:
            raise PrefixStoreError(f"{self.path} is locked by another process, for {timeout_s:.0f} seconds now") from None
        try:
            self._scratch.mkdir(mode=_PRIVATE_FOLDER, exist_ok=True)
            for left in self._scratch.iterdir():
                left.unlink()
            yield
        finally:
            lock.release()

    def _make_room(self, key: BlockKey, nbytes: int, *, is_full: bool) -> bool:
        """Count a block that will be written; False if it does not fit without deleting those before it. On a disk that `is_full`
        it takes the place of others."""
        if nbytes > self.max_bytes:
            return False
        total = None if is_full else self._read_total()
        if total is None or total + nbytes > self.max_bytes:
            files = list(self._files())
            total = sum(file.nbytes for file in files)
            most = min(total, self.max_bytes) if is_full else self.max_bytes
            victims = choose_victims(files, total + nbytes - most, (key.space, key.parent))
            total -= sum(victim.nbytes for victim in victims or () if _delete(victim.path))
            if victims is None:
                return False
        _write_small(self.path / "total", str(total + nbytes))
        return True

    def _read_total(self) -> int | None:
        """The bytes of all blocks, or more if a process was killed while it wrote one."""
        try:
            return int((self.path / "total").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def _describe(self, space: str, about: str) -> None:
        folder = self.path / space
        if (folder / _ABOUT).is_file():
            return
        folder.mkdir(mode=_PRIVATE_FOLDER, exist_ok=True)
        with written_whole(folder / _ABOUT, scratch=self._scratch / "about", mode=PRIVATE) as file:
            file.write(about.encode())

    def _spaces(self) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self.path) if is_space(entry.name) and entry.is_dir()]
        except FileNotFoundError:
            return []

    def _files(self) -> Iterator[BlockFile]:
        """Every block; one that vanishes meanwhile is left out."""
        for space in self._spaces():
            with contextlib.suppress(FileNotFoundError), os.scandir(self.path / space) as entries:
                for entry in entries:
                    if (parts := read_file_name(entry.name)) is not None:
                        with contextlib.suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            yield BlockFile(Path(entry.path), space, *parts, status.st_size, status.st_mtime_ns)

    def _model(self, space: str, files: Sequence[BlockFile]) -> StoredModel:
        try:
            about = Fields.of(parse((self.path / space / _ABOUT).read_bytes()))
            model, identity, block_tokens = about.text("model"), about.texts("identity"), about.count("block_tokens")
        except (OSError, ValueError):
            model, identity, block_tokens = space, {}, 0
        return StoredModel(
            space=space,
            model=model,
            identity=identity,
            blocks=len(files),
            tokens=block_tokens * len(files),
            nbytes=sum(file.nbytes for file in files),
            last_used=max(file.used_ns for file in files) / 1e9,
        )

    def _delete_space(self, space: str) -> None:
        folder = self.path / space
        with contextlib.suppress(FileNotFoundError):
            for path in folder.iterdir():
                if read_file_name(path.name) is not None or path.name == _ABOUT:
                    path.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def about_space(model: str, identity: Mapping[str, str], block_tokens: int) -> str:
    """The text of a space's file."""
    return json.dumps({"model": model, "identity": dict(identity), "block_tokens": block_tokens})


def _write_small(path: Path, text: str) -> None:
    """Write a file of one word, which is never needed: a torn one is no number, or another word."""
    with open(path, "w", encoding="ascii", opener=lambda name, flags: os.open(name, flags, PRIVATE)) as file:
        file.write(text)


def _delete(path: Path) -> bool:
    """Delete a file; False if it may not be deleted or, on Windows, is being read."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True
