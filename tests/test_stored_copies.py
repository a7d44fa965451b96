"""Copies of models that a machine of a cluster fetched: listed, deleted, and deleted for room, but never in use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rabbit_engine.cluster import stored
from rabbit_engine.cluster.stored import changing, delete_copy, make_room, stored_copies
from rabbit_engine.errors import ClusterError, NotEnoughDiskError

USE = """
import sys
from pathlib import Path
from rabbit_engine.cluster.stored import changing, use
folder = Path(sys.argv[1])
with changing(folder):
    use(folder, sys.argv[2], "driver")
print("used", flush=True)
sys.stdin.read()
"""


@contextmanager
def used(folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """A process that uses the copy."""
    command = [sys.executable, "-c", USE, str(folder), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "used\n"
        yield process
        process.kill()


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three of them, with 1 to 3 MB; the first is the one unused longest."""
    monkeypatch.setenv("RABBIT_ENGINE_CACHE", str(tmp_path))
    folder = tmp_path / "copies"
    for number, name in enumerate(("old", "middle", "new"), 1):
        copy = folder / (f"{number}" * 32)
        copy.mkdir(parents=True)
        (copy / "weights").write_bytes(bytes(number * 10**6))
        (copy / stored._NOTE).write_text(json.dumps({"name": name, "driver": "head"}))
        os.utime(copy / stored._NOTE, (number * 10**6, number * 10**6))
    return folder


def names(folder: Path) -> list[str]:
    return [copy.name for copy in stored_copies(folder)]


def test_a_copy_in_use_stays_until_its_process_ends_however_it_does(copies: Path) -> None:
    (newest, *_) = stored_copies(copies)
    with used(newest.folder, "new") as process:
        (found, *_) = stored_copies(copies)
        assert (found.name, found.driver, found.in_use) == ("new", "driver", True)
        assert not delete_copy(found)
        assert (found.folder / "weights").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        (found, *_) = stored_copies(copies)
        assert not found.in_use
        assert not list(copies.glob(".*.using")), "what a killed process left is deleted"
    assert delete_copy(found)
    assert names(copies) == ["middle", "old"]
    with changing(stored_copies(copies)[0].folder):
        assert not delete_copy(stored_copies(copies)[0]), "a process adds to it"


def test_room_comes_from_the_copies_unused_longest(
    copies: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def free(_: Path) -> int:
        return 10**6 + 6 * 10**6 - sum(int(copy.name[0]) * 10**6 for copy in copies.iterdir() if copy.is_dir() and copy != mine)

    mine = copies / ("9" * 32)
    mine.mkdir()
    monkeypatch.setattr(stored, "_free", free)
    make_room(mine, 10**6, "fetching x")
    assert len(names(copies)) == 4
    make_room(mine, 3_500_000, "fetching x")
    assert sorted(names(copies)) == ["9" * 32, "new"]
    assert [message.split(",")[0] for message in caplog.messages] == ["deleted the copy of old", "deleted the copy of middle"]
    with used(copies / ("3" * 32), "new"), pytest.raises(NotEnoughDiskError) as refused:
        make_room(mine, 5_000_000, "fetching x")
    assert "fetching x needs 5.00 MB" in str(refused.value)
    assert "4.00 MB are free, and other copies take 3.0" in str(refused.value)
    assert sorted(names(copies)) == ["9" * 32, "new"]
    with pytest.raises(NotEnoughDiskError):
        make_room(mine, 8_000_000, "fetching x")
    assert sorted(names(copies)) == ["9" * 32, "new"], "nothing is deleted if all of it is not enough"


def test_the_commands_list_and_delete_them(copies: Path, rabbit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rabbit("cache", "list").out.startswith("copies of models: 6.0"), "conftest wants no store of prefixes"
    monkeypatch.setenv("RABBIT_ENGINE_PREFIXES", str(copies.parent / "prefixes"))
    listed = rabbit("cache", "list")
    assert listed.out.startswith("no prefixes are stored in")
    assert "copies of models: 6.0" in listed.out
    assert "11111111" in listed.out
    found = json.loads(rabbit("cache", "list", "--json").out)
    assert [(copy["name"], copy["in_use"]) for copy in found["copies"]] == [("new", False), ("middle", False), ("old", False)]
    assert rabbit("cache", "list", "--folder", copies.parent / "other").out.count("copies") == 0
    with used(copies / ("3" * 32), "new"):
        done = rabbit("cache", "clear", "new")
        assert (done.code, "the copy of new" in done.err, "is in use and stays" in done.err) == (0, True, True)
    assert rabbit("cache", "clear", "22222222", "--only", "copies").out.startswith("deleted the copy of middle, 2.0")
    refused = rabbit("cache", "clear", "middle", "--only", "copies")
    assert (refused.code, "middle has no copy; those that have: new, old" in refused.err) == (2, True)
    assert rabbit("cache", "clear", "--only", "prefixes").code == 0
    assert sorted(names(copies)) == ["new", "old"]
    assert rabbit("cache", "clear", "nothing").code == 2
    assert rabbit("cache", "clear").code == 0
    assert names(copies) == []


def test_what_cannot_be_deleted_is_an_error(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(ClusterError, match=r"cannot be deleted \(Operation not permitted\)"):
        delete_copy(stored_copies(copies)[0])
