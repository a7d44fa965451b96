"""The file of caches that do not fit: disks that write a part, refuse, or read nothing past their cache."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from rabbit_engine.errors import CacheStorageError
from rabbit_engine.storage.directio import PAGE
from rabbit_engine.storage.scratchfile import ScratchFile


def pages(count: int, byte: int = 0) -> memoryview:
    memory = memoryview(mmap.mmap(-1, count * PAGE))
    memory[:] = bytes([byte]) * len(memory)
    return memory


def require_round_trip(file: ScratchFile) -> None:
    written, read = [pages(2, 3), pages(1, 5)], [pages(1), pages(2)]
    offset = file.claim(3 * PAGE)
    file.write(offset, written)
    file.read(offset, read)
    assert b"".join(read) == b"".join(written)


@pytest.mark.parametrize("least", [1000, PAGE, PAGE + 1])
def test_transfers_that_stop_within_a_page_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    def short(transfer: Any) -> Any:
        return lambda descriptor, buffers, offset: transfer(descriptor, [buffers[0][:least]], offset)

    file = ScratchFile(tmp_path)
    with monkeypatch.context() as patch:
        for name in ("pwritev", "preadv"):
            patch.setattr(os, name, _then(short(getattr(os, name)), getattr(os, name)), raising=False)
        require_round_trip(file)


def _then(first: Any, rest: Any) -> Any:
    """`first` at the first call: a buffered transfer of a part, as signals and full disks cause; then `rest`."""
    calls: list[object] = []

    def call(descriptor: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            return rest(descriptor, buffers, offset)
        import fcntl

        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
        done = first(descriptor, buffers, offset)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return done

    return call


def test_a_system_without_transfers_at_an_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pwritev", raising=False)
    monkeypatch.delattr(os, "preadv", raising=False)
    require_round_trip(ScratchFile(tmp_path))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheStorageError, match=r"cannot be written in .*file.*RABBIT_ENGINE_CACHE"):
        ScratchFile(tmp_path / "file" / "texts")


def test_an_extent_is_given_back_amid_bookkeeping(tmp_path: Path) -> None:
    """Finalizers give extents back, in whatever thread a garbage collection runs."""
    file = ScratchFile(tmp_path)

    def give() -> None:
        with file._lock:
            file.give(file.claim(1), 1)

    thread = threading.Thread(target=give, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert file.claim(1) == 0
