"""`rabbit chat`, `serve` and `batch` keep prompts on disk unasked: where there is a folder, within limits, without warnings."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from prefixing import BLOCK, IDENTITY, block_of, count_right, write

from rabbit_engine import PrefixStore, errors
from rabbit_engine.cli.prefixes import opened_store
from rabbit_engine.prefixes import default_bytes

TEXT = [*range(100, 100 + 4 * BLOCK), 7, 7]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RABBIT_ENGINE_PREFIXES", str(tmp_path / "prefixes"))
    return tmp_path / "prefixes"


def test_the_tests_store_nothing_in_the_users_folder() -> None:
    assert (os.environ["RABBIT_ENGINE_CACHE"], os.environ["RABBIT_ENGINE_PREFIXES"]) == ("", "")


def test_the_default_is_a_tenth_of_the_free_disk_and_at_most_10_gb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    for free, expected in ((10**12, 10 * 10**9), (50 * 10**9, 5 * 10**9), (5, 0)):
        usage = shutil.disk_usage(folder.parent)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: (asked.append(path), usage)[1])
        with opened_store(None) as store:
            assert (None if store is None else (store.folder, store._tiers.folder.max_bytes)) == (  # type: ignore[union-attr]
                (folder, expected) if expected else None
            )
    assert set(asked) == {folder.parent}, "the folder is not there yet"
    assert not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (_ for _ in ()).throw(OSError("gone")))
    assert default_bytes(folder) == 0


def test_a_size_or_off_decides(folder: Path) -> None:
    for size, expected in (("off", None), (" OFF", None), ("0", None), ("0GB", None), ("20MB", 20 * 10**6)):
        with opened_store(size) as store:
            assert (store and store._tiers.folder and store._tiers.folder.max_bytes) == expected


def test_without_a_folder_only_one_that_was_asked_for_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "off", "0"):
        with opened_store(size) as store:
            assert store is None
    with pytest.raises(errors.ConfigurationError, match="--prefix-store needs a folder"), opened_store("1GB"):
        pass
    monkeypatch.delenv("RABBIT_ENGINE_PREFIXES")
    with opened_store(None) as store:
        assert store is None


@pytest.mark.parametrize(("size", "level"), [(None, logging.INFO), ("1MB", logging.WARNING)])
def test_faults_are_warnings_only_for_those_who_asked(
    folder: Path, caplog: pytest.LogCaptureFixture, size: str | None, level: int
) -> None:
    folder.write_text("a file where the folder should be")
    caplog.set_level(logging.INFO, "rabbit_engine")
    with opened_store(size) as store:
        assert store is not None
        store.space(IDENTITY).write([1] * 256, 0, {"a": torch.ones(1)})
        assert store.flush(20)
    (said,) = caplog.records
    assert said.levelno == level
    assert "prefixes are not stored for now" in said.getMessage()


def test_of_a_batch_what_a_second_text_begins_with_is_stored(tmp_path: Path) -> None:
    texts = [TEXT, [9, *TEXT[1:]], [*TEXT[: 2 * BLOCK + 1], *range(50)], TEXT]
    with PrefixStore(tmp_path / "store", 10**9, block_tokens=BLOCK, repeated_only=True) as store:
        space = store.space(IDENTITY)
        counts = [space.text(text).blocks_to_store() for text in texts]
        assert counts == [0, 0, 2, 4]
        for index in range(counts[2]):
            assert space.write(texts[2], index, block_of(texts[2], index))
        assert store.flush(20)
        assert [count_right(space, text) for text in texts] == [2, 0, 2, 2]
    with PrefixStore(tmp_path / "store", 10**9, block_tokens=BLOCK) as store:
        assert [store.space(IDENTITY).text(text).blocks_to_store() for text in texts] == [4, 4, 14, 4]
        assert write(store.space(IDENTITY), TEXT) == [True] * 4
