"""The prefix store gives back what was written, or nothing: whatever happens to its files, its disk or its processes."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import outcome_in_a_child
from prefixing import BLOCK, IDENTITY, block_of, count_right, write

from rabbit_engine import errors
from rabbit_engine.prefixes import Prefix, PrefixSpace, PrefixStore, default_folder, folder, keys, tiers
from rabbit_engine.prefixes.eviction import BlockFile, choose_victims
from rabbit_engine.storage.directio import aligned_up

HARNESS = Path(__file__).with_name("prefixing.py")
FILE_BYTES = 3 * 4096
"""The size of a block's file."""

TEXT = [*range(100, 100 + 4 * BLOCK), 7, 7]
OTHER = [*TEXT[: 2 * BLOCK], *range(50, 50 + 2 * BLOCK)]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., PrefixStore]]:
    """`open_store(**keywords)` opens one more store on the folder of the test, which is closed at the end."""
    opened: list[PrefixStore] = []

    def call(**keywords: Any) -> PrefixStore:
        given = {"folder": tmp_path / "store", "max_bytes": 10**9, "block_tokens": BLOCK}
        opened.append(PrefixStore(**{**given, **keywords}))
        return opened[-1]

    yield call
    for store in opened:
        store.close()


@pytest.fixture
def space(open_store: Any) -> PrefixSpace:
    """A space with TEXT, on disk."""
    store = open_store()
    space = store.space(IDENTITY, "a model")
    assert write(space, TEXT) == [True] * 4
    assert store.flush(20)
    return space


def files_in(path: Path) -> list[Path]:
    """The blocks' files, in the order of their indices."""
    return sorted(path.glob("store/*/*.safetensors"), key=lambda file: int(file.name.split("-")[0]))


def flush(store: PrefixStore) -> None:
    assert store.flush(20)


# What is found.


def test_blocks_come_back_with_every_bit(open_store: Any) -> None:
    random_state = torch.Generator().manual_seed(3)
    raw = torch.randint(0, 256, (4 * 3001,), dtype=torch.uint8, generator=random_state)
    tensors = {
        "float32, with NaNs of any kind": raw.view(torch.float32),
        "bfloat16": raw[: 2 * 35].view(torch.bfloat16).reshape(5, 7),
        "int8": raw[:1].view(torch.int8),
        "fp8": raw[:4097].view(torch.float8_e4m3fn),
        "bool": torch.tensor([[True], [False]]),
        "int64": torch.tensor(-5),
        "nothing": torch.empty(3, 0, 2, dtype=torch.float16),
        "a view": raw.view(torch.int16)[: 6 * 1000].reshape(2, 3, 1000).transpose(0, 2)[::7],
        "same memory": raw[:1].view(torch.int8).expand(2, 9),
        'a name with "quotes", é and 日': torch.ones(1, requires_grad=True),
    }
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    store = open_store()
    assert store.space(IDENTITY).write(TEXT, 0, tensors)
    raw.zero_()  # the store has a copy
    flush(store)
    (block,) = open_store().space(IDENTITY).find(TEXT).blocks()
    assert list(block) == list(kept)
    for name, tensor in kept.items():
        found = block[name]
        assert (found.dtype, found.shape, found.requires_grad) == (tensor.dtype, tensor.shape, False), name
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)), name


def test_the_longest_chain_of_whole_blocks_is_found(space: PrefixSpace) -> None:
    assert (space.find(TEXT).tokens, len(space.find(TEXT)), count_right(space, TEXT)) == (4 * BLOCK, 4, 4)
    assert count_right(space, [*TEXT, 1, 2, 3, 4, 5]) == 4
    assert [space.find(TEXT[:length]).tokens for length in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 1)] == [0, 0, 0, BLOCK, 2 * BLOCK]
    assert list(space.find(TEXT[1:]).blocks()) == []


def test_a_text_that_differs_anywhere_is_found_up_to_there(space: PrefixSpace) -> None:
    for position in range(4 * BLOCK):
        changed = list(TEXT)
        changed[position] += 1
        assert space.find(changed).tokens == position // BLOCK * BLOCK


def test_a_common_beginning_is_stored_once(space: PrefixSpace, tmp_path: Path, open_store: Any) -> None:
    assert write(space, OTHER) == [True] * 4
    flush(space._store)
    assert len(files_in(tmp_path)) == 6
    assert (count_right(space, TEXT), count_right(space, OTHER)) == (4, 4)


def test_tensors_of_one_shape_are_one(open_store: Any) -> None:
    store, tensors = open_store(), [torch.full((2, 3), number) for number in range(3)]
    space = store.space(IDENTITY)
    assert space.write(TEXT, 0, {"a b c": tensors, "d": torch.ones(1)})
    flush(store)
    (block,) = space.find(TEXT).blocks()
    assert torch.equal(block["a b c"], torch.stack(tensors))


def test_blocks_of_another_identity_are_never_seen(space: PrefixSpace, open_store: Any) -> None:
    for other in ({}, {**IDENTITY, "dtype": "float16"}, {**IDENTITY, "device": "cuda"}):
        assert space._store.space(other, "a model").find(TEXT).tokens == 0
    assert open_store(block_tokens=BLOCK // 2).space(IDENTITY).find(TEXT).tokens == 0
    assert open_store().space(dict(reversed(IDENTITY.items())), "another name").find(TEXT).tokens == 4 * BLOCK


def test_tokens_are_compared_where_names_collide(open_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_hash", lambda raw: "0" * 40)
    store = open_store()
    space = store.space(IDENTITY)
    assert space.write(TEXT, 0, block_of(TEXT, 0))
    flush(store)
    assert count_right(space, TEXT[:BLOCK]) == 1
    assert space.find(OTHER[2 * BLOCK :]).names(0) == ()
    assert count_right(space, OTHER[2 * BLOCK :]) == 0
    assert space.find(TEXT).tokens == 0, "the file was taken for a foreign one"


def test_tensors_are_read_by_name(space: PrefixSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = space.find(TEXT)
    read: list[list[str]] = []
    whole = tiers.read_tensors
    monkeypatch.setattr(tiers, "read_tensors", lambda header, names: (read.append(list(names)), whole(header, names))[1])
    assert prefix.names(0) == ("keys.0", "state")
    blocks = list(prefix.blocks(wanted=lambda index, name: name != "state" or index == 3, ahead=1))
    assert [list(block) for block in blocks] == [["keys.0"]] * 3 + [["keys.0", "state"]]
    assert read == [["keys.0"]] * 3 + [["keys.0", "state"]]
    assert torch.equal(blocks[3]["state"], block_of(TEXT, 3)["state"])
    state = prefix.read_block(2, lambda _, name: name == "state")
    assert state is not None
    assert torch.equal(state["state"], block_of(TEXT, 2)["state"])
    assert len(list(prefix.blocks(3))) == 1
    assert (prefix.cut(2).tokens, len(list(prefix.cut(2).blocks()))) == (2 * BLOCK, 2)


def test_a_block_that_lacks_a_tensor_is_replaced(space: PrefixSpace, tmp_path: Path) -> None:
    store, last = space._store, block_of(TEXT, 3)
    before = files_in(tmp_path)[3].stat()
    assert space.write(TEXT, 3, {"state": last["state"]})
    flush(store)
    assert files_in(tmp_path)[3].stat().st_ino == before.st_ino, "nothing was missing"
    old = space.find(TEXT)
    assert space.write(TEXT, 3, {"more": torch.ones(3), **last})
    flush(store)
    (*_, block) = space.find(TEXT).blocks()
    assert list(block) == ["more", "keys.0", "state"]
    assert len(list(old.blocks())) >= 3
    assert space.find(TEXT).tokens == 4 * BLOCK, "who found the old file deleted the new one"


def test_texts_and_tensors_that_no_block_can_have_are_refused(space: PrefixSpace) -> None:
    for index in (-1, 4, 5):
        with pytest.raises(ValueError, match="have no whole block"):
            space.write(TEXT, index, {"a": torch.ones(1)})
    for tensors, words in (
        ({}, "at least one tensor"),
        ({"__pad__.1": torch.ones(1)}, "cannot be named '__pad__.1'"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "a is torch.complex128"),
    ):
        with pytest.raises(ValueError, match=words):
            space.write(TEXT, 0, tensors)
    for keywords in ({"max_bytes": -1}, {"block_tokens": 0}, {"memory_bytes": 1.5}):
        with pytest.raises(errors.ConfigurationError, match=next(iter(keywords))):
            PrefixStore(**{"folder": None, "max_bytes": 1, **keywords})


# Damage.


def test_a_flipped_bit_anywhere_is_a_miss_and_the_file_goes(space: PrefixSpace, tmp_path: Path) -> None:
    path = files_in(tmp_path)[1]
    raw = path.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    source = random.Random(1)
    used = raw.rindex(b"}", 0, data) + 1
    everywhere = [*range(8), *range(8, used, 5), *range(used, data, 97), *range(data, len(raw), 251), len(raw) - 1]
    assert len(everywhere) > 150
    for position in everywhere:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << source.randrange(8)
        path.write_bytes(damaged)
        assert count_right(space, TEXT) == 1, position
        assert not path.exists(), position
    path.write_bytes(raw)
    assert count_right(space, TEXT) == 4


def test_a_file_of_another_length_is_a_miss(space: PrefixSpace, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = files_in(tmp_path)[2]
    raw = path.read_bytes()
    for damaged in (b"", raw[:7], raw[:100], raw[:5000], raw[:-1], raw + b"\0", raw + raw, b"<html>", bytes(len(raw))):
        path.write_bytes(damaged)
        caplog.clear()
        assert count_right(space, TEXT) == 2
        assert not path.exists()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) <= 1, "said once"


def test_a_damaged_block_is_said_once_and_computed_again(
    space: PrefixSpace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = files_in(tmp_path)[3]
    path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))
    prefix = space.find(TEXT)
    assert prefix.tokens == 4 * BLOCK, "contents are checked when they are read"
    assert len(list(prefix.blocks())) == 3
    assert prefix.read_block(3) is None
    (said,) = [record.getMessage() for record in caplog.records]
    assert "its tokens are computed again" in said
    assert "the checksum of state differs" in said
    assert space.write(TEXT, 3, block_of(TEXT, 3))
    flush(space._store)
    assert count_right(space, TEXT) == 4


def test_a_file_in_another_blocks_place_is_a_miss(space: PrefixSpace, tmp_path: Path) -> None:
    other = space._store.space({"fingerprint": "another"})
    write(space, OTHER)
    write(other, TEXT)
    flush(space._store)
    for text, index, place in ((OTHER, 2, (space, TEXT, 2)), (TEXT, 3, (space, TEXT, 2)), (TEXT, 0, (other, TEXT, 0))):
        source = list(keys.chain(space.name, text, BLOCK))[index]
        target = list(keys.chain(place[0].name, place[1], BLOCK))[place[2]]
        path = tmp_path / "store" / target.space / target.file
        shutil.copy(tmp_path / "store" / source.space / source.file, path)
        assert count_right(*place[:2]) == place[2]
        assert not path.exists()


def test_a_file_that_cannot_be_read_ends_the_chain(space: PrefixSpace, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = files_in(tmp_path)[2]
    path.unlink()
    path.mkdir()  # which cannot be deleted as a file either
    assert [count_right(space, TEXT) for _ in range(3)] == [2, 2, 2]
    assert len(caplog.records) == 1
    path.rmdir()
    path.symlink_to(tmp_path / "nowhere")
    assert count_right(space, TEXT) == 2


def test_a_process_without_room_for_files_or_memory_deletes_nothing(
    space: PrefixSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        cause = OSError(errno.EMFILE, "too many open files")
        raise errors.UnreadableFileError("no more files") from cause

    def refuse(*_: Any) -> Any:
        raise errors.BudgetError("no more memory")

    for fault in (fail, refuse):
        for place, name in ((folder, "read_block_header"), (tiers, "read_tensors")):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, fault)
                assert count_right(space, TEXT) == 0
    assert len(files_in(tmp_path)) == 4
    assert count_right(space, TEXT) == 4


# The size limit.


def row(index: int, name: str, parent: str, used: int, space: str = "s", nbytes: int = 10) -> BlockFile:
    return BlockFile(Path(name), space, index, name, parent, nbytes, used)


def test_the_ends_of_the_texts_used_least_recently_go_first() -> None:
    files = [
        *(row(0, "a0", "s", 1), row(1, "a1", "a0", 2), row(2, "a2", "a1", 9)),  # used last, though its beginning is old
        *(row(1, "b1", "a0", 5), row(2, "b2", "b1", 5)),
        *(row(0, "c0", "t", 3, "t"), row(1, "c1", "c0", 4, "t")),
        *(row(4, "lost", "gone", 99), row(5, "lost too", "lost", 99)),
    ]

    def names(excess: int, parent: tuple[str, str] | None = None) -> list[str] | None:
        chosen = choose_victims(files, excess, parent)
        return None if chosen is None else [file.name for file in chosen]

    assert names(0) == []
    assert names(1) == ["lost too"]
    assert names(90) == ["lost too", "lost", "c1", "c0", "b2", "b1", "a2", "a1", "a0"]
    assert names(91) is None
    assert names(70, ("s", "b1")) == ["lost too", "lost", "c1", "c0", "b2", "a2", "a1"]
    assert names(71, ("s", "b1")) is None


def test_the_limit_holds_and_the_text_used_last_stays(open_store: Any, tmp_path: Path) -> None:
    store = open_store(max_bytes=6 * FILE_BYTES)
    space = store.space(IDENTITY)
    texts = [[start, *TEXT[1 : 2 * BLOCK]] for start in range(5)]
    for start, text in enumerate(texts):
        write(space, text)
        flush(store)
        time.sleep(0.01)  # the clock of files has ticks
        if start == 2:
            assert count_right(space, texts[0]) == 2, "and counts as used now"
        assert len(files_in(tmp_path)) <= 6
        assert sum(file.stat().st_size for file in files_in(tmp_path)) <= 6 * FILE_BYTES
    assert [count_right(space, text) for text in texts] == [2, 0, 0, 2, 2]


def test_a_text_longer_than_the_store_keeps_its_beginning(open_store: Any, tmp_path: Path) -> None:
    store = open_store(max_bytes=3 * FILE_BYTES)
    space = store.space(IDENTITY)
    for index in range(4):
        space.write(TEXT, index, block_of(TEXT, index))
        flush(store)
    assert count_right(space, TEXT) == 3
    assert not space.write([*TEXT, *TEXT], 5, block_of(TEXT, 0)), "what follows a block that is not stored is never found"
    with open_store(max_bytes=FILE_BYTES - 1, folder=tmp_path / "tiny") as tiny:
        assert tiny.space(IDENTITY).write(TEXT, 0, block_of(TEXT, 0))
        flush(tiny)
        assert tiny.models() == []


# Memory.


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read since the start of the test: contents ("read_tensors") and headers ("read_block_header")."""
    calls: list[str] = []
    for place, name in ((tiers, "read_tensors"), (folder, "read_block_header")):
        whole = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given, name=name, whole=whole: (calls.append(name), whole(*given))[1])
    return calls


def test_the_next_turn_of_a_text_reads_nothing(open_store: Any, read: list[str]) -> None:
    store = open_store(memory_bytes=10 * FILE_BYTES)
    space = store.space(IDENTITY)
    write(space, TEXT)
    assert count_right(space, TEXT) == 4, "also while it waits for the disk"
    flush(store)
    assert (count_right(space, TEXT), read) == (4, [])
    later = open_store(memory_bytes=10 * FILE_BYTES).space(IDENTITY)
    assert (count_right(later, TEXT), len(read)) == (4, 8)
    assert (count_right(later, TEXT), len(read)) == (4, 8)


def test_a_lookup_reads_no_file(space: PrefixSpace, read: list[str]) -> None:
    prefix = space.find(TEXT)
    assert (prefix.tokens, read) == (4 * BLOCK, [])
    assert prefix.names(3) == ("keys.0", "state")
    assert prefix.block_bytes(3) == sum(aligned_up(tensor.nbytes) for tensor in block_of(TEXT, 3).values())
    assert prefix.read_block(3) is not None
    assert read == ["read_block_header", "read_tensors"], "a header once"


def test_memory_has_a_limit_and_keeps_beginnings(open_store: Any, space: PrefixSpace, read: list[str]) -> None:
    store = open_store(memory_bytes=3 * 8192)
    small = store.space(IDENTITY)
    for _ in range(3):
        assert count_right(small, TEXT) == 4
        assert store._tiers.memory.nbytes <= 3 * 8192
    assert read.count("read_tensors") == 4 + 1 + 1, "three blocks stay, the last is read again"
    assert count_right(small, OTHER) == 2
    assert read.count("read_tensors") == 6


def test_without_a_folder_blocks_are_in_memory_alone(tmp_path: Path) -> None:
    with PrefixStore(None, 0, memory_bytes=4 * 8192, block_tokens=BLOCK) as store:
        space = store.space(IDENTITY)
        assert write(space, TEXT) == [True] * 4
        assert write(space, TEXT) == [True] * 4
        assert count_right(space, TEXT) == 4
        assert not space.write(TEXT, 0, {"large": torch.zeros(9 * 4096)})
        assert store.models() == []
        store.clear()
        assert count_right(space, TEXT) == 0
    assert list(tmp_path.iterdir()) == []


# The queue.


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writes of blocks wait for this event."""
    event, whole = threading.Event(), folder.write_block
    monkeypatch.setattr(folder, "write_block", lambda *arguments: (event.wait(20), whole(*arguments))[1])
    yield event
    event.set()


def test_a_full_queue_drops_blocks_and_nobody_waits(open_store: Any, stuck: threading.Event, tmp_path: Path) -> None:
    nbytes = sum(tensor.nbytes for tensor in block_of(TEXT, 0).values())
    store = open_store(queue_bytes=2 * nbytes)
    space = store.space(IDENTITY)
    began = time.monotonic()
    assert write(space, TEXT) == [True, True, False, False]
    assert not store.flush(0.01)
    assert time.monotonic() - began < 5
    assert count_right(space, TEXT) == 2, "those that wait are found"
    stuck.set()
    flush(store)
    assert space.write(TEXT, 2, block_of(TEXT, 2)), "there is room again"
    flush(store)
    assert count_right(space, TEXT) == 3
    assert len(files_in(tmp_path)) == 3


def test_a_block_larger_than_the_queue_is_said_once(open_store: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(queue_bytes=700)
    assert [store.space(IDENTITY).write(TEXT, 0, block_of(TEXT, 0)) for _ in range(2)] == [False, False]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "prefixes are not stored: a block has 2.85 kB, the queue for them 700 B"


def test_a_block_larger_than_the_queue_waits_alone(open_store: Any, stuck: threading.Event) -> None:
    store = open_store(queue_bytes=1000)
    space = store.space(IDENTITY)
    assert [space.write(TEXT, index, block_of(TEXT, index)) for index in (0, 1)] == [True, False]
    stuck.set()
    flush(store)
    assert space.write(TEXT, 1, block_of(TEXT, 1))
    flush(store)
    assert count_right(space, TEXT) == 2


def test_a_block_with_more_tensors_waits_until_the_one_with_fewer_is_written(open_store: Any, stuck: threading.Event) -> None:
    store = open_store()
    space, whole = store.space(IDENTITY), block_of(TEXT, 0)
    assert space.write(TEXT, 0, {"state": whole["state"]})
    assert not space.write(TEXT, 0, whole)
    assert space.write(TEXT, 0, {"state": whole["state"]})
    stuck.set()
    flush(store)
    assert space.write(TEXT, 0, whole)
    flush(store)
    assert count_right(space, TEXT) == 1


# Faults of the disk.


def test_a_full_disk_is_said_once_and_stores_again_later(
    open_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rabbit_engine.prefixes import blockfile

    def fail(file: Any, *_: Any) -> str:
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = open_store(memory_bytes=10**6)
    space = store.space(IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(blockfile, "_write_tensor", fail)
        for _ in range(3):
            write(space, TEXT)
            flush(store)
            assert count_right(space, TEXT) == 0
            store._tiers._resumes_at = 0.0
        assert [path.name for path in tmp_path.glob("store/writing/*")] == []
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "prefixes are not stored for now, answers go on: [Errno 28] No space left on device"
    assert write(space, TEXT) == [True] * 4
    flush(store)
    assert count_right(space, TEXT) == 4
    store._tiers._resumes_at = time.monotonic() + 60
    assert not space.write(OTHER, 2, block_of(OTHER, 2)), "nothing is tried right after a fault"


def test_on_a_full_disk_blocks_take_the_place_of_those_used_least_recently(
    open_store: Any, space: PrefixSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rabbit_engine.prefixes import blockfile

    def write_tensor(*arguments: Any) -> str:
        if len(files_in(tmp_path)) >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*arguments)

    whole = blockfile._write_tensor
    monkeypatch.setattr(blockfile, "_write_tensor", write_tensor)
    long = [*range(5 * BLOCK)]
    for index in range(5):
        assert space.write(long, index, block_of(long, index))
        flush(space._store)
        if index < 4:
            assert count_right(space, long) == index + 1
            assert count_right(space, TEXT) == 3 - index, "the end of the older text went"
            assert caplog.records == []
    assert count_right(space, long) == 4, "no block takes the place of those before it"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "No space left on device" in said
    assert int((tmp_path / "store" / "total").read_text()) >= 4 * FILE_BYTES


@contextmanager
def as_nobody() -> Iterator[None]:
    """Permissions mean nothing to root: be another user meanwhile."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_without_permission_to_write_it_is_read_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o777)
        with as_nobody():
            with PrefixStore(root / "store", 10**9, block_tokens=BLOCK) as store:
                write(store.space(IDENTITY), TEXT)
            folders = [root / "store", *(path for path in root.glob("store/*") if path.is_dir())]
            for path in folders:
                path.chmod(0o500)
            with PrefixStore(root / "store", 10**9, block_tokens=BLOCK) as store:
                space = store.space(IDENTITY)
                assert count_right(space, TEXT) == 4
                assert caplog.records == []
                space.write(OTHER, 2, block_of(OTHER, 2))
                flush(store)
                assert count_right(space, OTHER) == 2
                with pytest.raises(errors.PrefixStoreError, match="cannot be cleared"):
                    store.clear()
            (said,) = [record.getMessage() for record in caplog.records]
            assert "prefixes are not stored for now" in said
            for path in folders:
                path.chmod(0o700)
            with PrefixStore(root / "store", 10**9, block_tokens=BLOCK) as store:
                store.clear()


def test_a_lock_that_is_never_released_stops_the_storing_alone(
    open_store: Any, space: PrefixSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folder, "_LOCK_S", 0.1)
    with folder.FileLock(tmp_path / "store" / "lock"):
        store = open_store()
        other = store.space(IDENTITY)
        assert other.write(OTHER, 2, block_of(OTHER, 2))
        flush(store)
        assert count_right(other, OTHER) == 2
        with pytest.raises(errors.PrefixStoreError, match="is locked by another process"):
            store.clear()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "is locked by another process" in said


def test_a_block_that_two_processes_have_at_once_is_written_once(
    open_store: Any, space: PrefixSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    whole = folder.write_block
    monkeypatch.setattr(folder, "write_block", lambda *arguments: (written.append(arguments[0]), whole(*arguments))[1])
    stores = [open_store(), open_store()]
    with folder.FileLock(tmp_path / "store" / "lock"):
        assert [store.space(IDENTITY).write(OTHER, 2, block_of(OTHER, 2)) for store in stores] == [True, True]
    for store in stores:
        flush(store)
    assert len(written) == 1
    assert count_right(space, OTHER) == 3


# What is left behind.


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_nobody_else_may_read_the_files(tmp_path: Path, open_store: Any) -> None:
    before = os.umask(0)
    try:
        store = open_store()
        write(store.space(IDENTITY, "a model"), TEXT)
        flush(store)
        store.clear("a model")
        write(store.space(IDENTITY, "a model"), TEXT)
        flush(store)
    finally:
        os.umask(before)
    found = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
    assert {path.name for path in found} >= {"lock", "total", "cleared", "space.json", "writing"}
    assert len(files_in(tmp_path)) == 4
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def store_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rabbit-prefix")]


def test_close_writes_what_waits_and_leaves_nothing(open_store: Any, tmp_path: Path) -> None:
    store = open_store(memory_bytes=10**6)
    space = store.space(IDENTITY)
    assert store_threads() == []
    write(space, TEXT)
    assert store_threads() == ["rabbit-prefixes"]
    store.close()
    assert store_threads() == []
    assert len(files_in(tmp_path)) == 4
    assert list(tmp_path.glob("store/writing/*")) == []
    assert store._tiers.memory.nbytes == 0
    assert (space.find(TEXT).tokens, space.write(TEXT, 0, block_of(TEXT, 0))) == (0, False)
    store.close()


def test_close_does_not_wait_longer_than_it_is_told(open_store: Any, stuck: threading.Event, tmp_path: Path) -> None:
    store = open_store()
    write(store.space(IDENTITY), TEXT)
    began = time.monotonic()
    store.close(timeout_s=0.05)
    assert time.monotonic() - began < 5
    stuck.set()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "rabbit-prefixes"]
    thread.join(20)
    assert len(files_in(tmp_path)) == 1, "the rest of the queue is dropped"


def test_a_store_that_nobody_holds_ends_its_thread(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path / "store", 10**9, block_tokens=BLOCK)
    write(store.space(IDENTITY), TEXT)
    del store
    gc.collect()
    assert store_threads() == []


def test_blocks_are_read_ahead_and_in_order(space: PrefixSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, whole = [], Prefix.read_block
    monkeypatch.setattr(Prefix, "read_block", lambda self, index, wanted: (begun.append(index), whole(self, index, wanted))[1])
    blocks = space.find(TEXT).blocks(ahead=2)
    assert torch.equal(next(blocks)["state"], block_of(TEXT, 0)["state"])
    until = time.monotonic() + 20
    while len(begun) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)
    assert sorted(begun) == [0, 1, 2], "two ahead of the one in use, and no more"
    assert len(list(blocks)) == 3


def test_reading_ahead_ends_with_the_reading(space: PrefixSpace) -> None:
    blocks = space.find(TEXT).blocks()
    next(blocks)
    assert len(store_threads()) > 1
    blocks.close()
    assert store_threads() == ["rabbit-prefixes"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_child_finds_and_stores_nothing(space: PrefixSpace, tmp_path: Path) -> None:
    def work() -> None:
        assert space.find(TEXT).tokens == 0
        assert not space.write(OTHER, 2, block_of(OTHER, 2))
        space._store.close()

    with space._store._tiers.writer._changed, space._store._tiers.memory._lock:  # held by threads that the child lacks
        assert outcome_in_a_child(work) == "nothing"
    assert count_right(space, TEXT) == 4


# Clearing.


def test_clear_deletes_everything_that_is_ours(space: PrefixSpace, tmp_path: Path) -> None:
    (tmp_path / "store" / "writing" / "block").write_bytes(b"left by a kill")
    (tmp_path / "store" / "notes.txt").write_text("mine")
    (deleted,) = space._store.clear()
    assert (deleted.model, deleted.blocks, deleted.tokens, deleted.nbytes) == ("a model", 4, 4 * BLOCK, 4 * FILE_BYTES)
    left = {path.name for path in (tmp_path / "store").rglob("*")}
    assert left == {"lock", "cleared", "writing", "notes.txt"}
    assert space._store.clear() == []
    write(space, TEXT)
    flush(space._store)
    assert count_right(space, TEXT) == 4


def test_clear_of_one_model_leaves_the_others(space: PrefixSpace, open_store: Any) -> None:
    store = space._store
    other = store.space({"fingerprint": "another"}, "another model")
    write(other, TEXT)
    flush(store)
    assert [model.model for model in store.models()] == ["another model", "a model"]
    with pytest.raises(
        errors.ConfigurationError, match="'third' has no stored prefixes; those that have: a model, another model"
    ):
        store.clear("third")
    store.clear("another model")
    assert (count_right(other, TEXT), count_right(space, TEXT)) == (0, 4)
    open_store().clear(space.name[:8])
    assert store.models() == []


def test_clear_reaches_the_memory_and_the_queue_of_others(
    open_store: Any, stuck: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(memory_bytes=10**6)
    space = store.space(IDENTITY)
    began, waiting = threading.Event(), folder.StoreFolder.store
    monkeypatch.setattr(
        folder.StoreFolder, "store", lambda *arguments: (began.set(), stuck.wait(20), waiting(*arguments))[2]
    )  # as if it waited for the lock
    write(space, TEXT)
    assert began.wait(20)
    open_store().clear()
    stuck.set()
    flush(store)
    assert files_in(tmp_path) == []
    assert count_right(space, TEXT) == 0
    write(space, TEXT)
    flush(store)
    assert count_right(space, TEXT) == 4
    open_store().clear()
    assert count_right(space, TEXT) == 0, "it was in memory"


def test_clear_while_another_reads_ends_the_prefix(space: PrefixSpace, open_store: Any, caplog: pytest.LogCaptureFixture) -> None:
    prefix: Prefix = space.find(TEXT)
    blocks = prefix.blocks()
    next(blocks)
    open_store().clear()
    assert len(list(blocks)) <= 2, "two were read ahead"
    assert prefix.read_block(3) is None
    assert caplog.records == []


# Several processes, and kills.


def run_harness(tmp_path: Path, *arguments: object) -> int:
    command = [sys.executable, str(HARNESS), str(tmp_path / "store"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.parametrize(("mode", "number"), [("killed", 30), ("crowd", 0.7)])
def test_processes_that_share_a_store_or_are_killed_find_right_blocks(tmp_path: Path, mode: str, number: float) -> None:
    assert run_harness(tmp_path, mode, number) > 0


# The command.


def test_the_command_lists_and_clears(space: PrefixSpace, rabbit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RABBIT_ENGINE_PREFIXES", str(tmp_path / "store"))
    listed = rabbit("cache", "list")
    assert (listed.code, listed.err) == (0, "")
    assert listed.out.startswith(f"49.15 kB in {tmp_path / 'store'}\n")
    assert all(word in listed.out for word in ("a model", space.name[:8], "16", "49.15 kB"))
    (model,) = json.loads(rabbit("cache", "list", "--json").out)["prefixes"]
    assert (model["model"], model["identity"], model["blocks"], model["tokens"]) == ("a model", IDENTITY, 4, 16)
    assert abs(model["last_used"] - time.time()) < 3600
    refused = rabbit("cache", "clear", "b model")
    assert (refused.code, refused.err) == (2, "error: 'b model' has no stored prefixes; those that have: a model\n")
    assert rabbit("cache", "clear", "a model").out == f"deleted 4 blocks, 49.15 kB, in {tmp_path / 'store'}\n"
    assert files_in(tmp_path) == []
    assert rabbit("cache", "list", "--folder", tmp_path / "none").out == f"no prefixes are stored in {tmp_path / 'none'}\n"
    assert rabbit("cache", "clear", "--folder", tmp_path / "none").code == 0
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("RABBIT_ENGINE_PREFIXES", "")
    assert rabbit("cache", "list").code == 2


def test_the_folder_is_where_the_variables_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RABBIT_ENGINE_PREFIXES", raising=False)
    assert default_folder() is None, "conftest wants no cache"
    monkeypatch.setenv("RABBIT_ENGINE_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "prefixes"
    monkeypatch.setenv("RABBIT_ENGINE_PREFIXES", str(tmp_path / "p"))
    assert default_folder() == tmp_path / "p"
    monkeypatch.setenv("RABBIT_ENGINE_PREFIXES", "")
    assert default_folder() is None
