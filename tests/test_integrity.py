"""`rabbit verify` of a checkpoint's own files: blobs of the Hub cache by their names, a plain folder by recorded sums."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rabbit_engine import errors
from rabbit_engine.checkpoints.hub import find_repo
from rabbit_engine.checkpoints.integrity import SUMS_NAME, compare_files, record_sums
from rabbit_engine.cli.app import app
from rabbit_engine.config import SourceConfig


def flip(path: Path, position: int = -9) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 4
    path.write_bytes(raw)


def rabbit(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, errors.RabbitError):
        raise done.exception
    return done.exit_code, done.output


def in_cache(folder: Path, cache: Path, name: str = "org/tiny") -> Path:
    """The snapshot of a repo in a Hub cache, as huggingface_hub lays it out: weights by SHA-256, the rest by git's SHA-1."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for path in folder.glob("*.*"):
        raw = path.read_bytes()
        sha1 = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
        blob = root / "blobs" / (hashlib.sha256(raw).hexdigest() if path.suffix == ".safetensors" else sha1)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return snapshot


def states(repo: Any) -> dict[str, str]:
    return {state.path.name: state.state for state in compare_files(repo, lambda _: None)}


@pytest.mark.parametrize("damaged", ["model-00002-of-00003.safetensors", "config.json"])
def test_a_flipped_bit_in_the_hub_cache_is_named(
    damaged: str, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = in_cache(checkpoint("llama"), tmp_path)
    code, said = rabbit("verify", "org/tiny")
    assert (code, "6 of 6 files are whole" in said) == (0, True)
    flip((snapshot / damaged).resolve())
    code, said = rabbit("verify", "org/tiny")
    assert code == 1
    assert f"damaged: {snapshot / damaged} has changed" in said
    assert "5 of 6 files are whole" in said


def test_a_plain_folder_is_recorded_once_and_compared_after_that(own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    code, said = rabbit("verify", folder)
    assert code == 1
    assert f"rabbit verify --record {folder}" in said
    assert rabbit("verify", folder, "--record")[0] == 0
    assert (folder / SUMS_NAME).is_file()
    code, said = rabbit("verify", folder)
    assert (code, "6 of 6 files are whole" in said, "unrecorded" in said) == (0, True, False)
    flip(folder / "model-00003-of-00003.safetensors")
    (folder / "generation_config.json").unlink()
    code, said = rabbit("verify", folder)
    assert code == 1
    assert "model-00003-of-00003.safetensors has changed" in said
    assert "generation_config.json is missing" in said
    assert "4 of 6 files are whole" in said


def test_sums_of_a_folder_that_cannot_be_written_lie_in_our_cache(
    own_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    folder = own_checkpoint("llama")
    (folder / f".{SUMS_NAME}.scratch").mkdir()  # nothing can be written under this name, not even by root
    repo = find_repo(folder, SourceConfig())
    path = record_sums(repo, lambda _: None)
    assert path.is_relative_to(tmp_path / "home")
    assert set(states(repo).values()) == {"whole"}
    flip(folder / "model-00001-of-00003.safetensors")
    assert states(repo)["model-00001-of-00003.safetensors"] == "damaged"


def test_damaged_sums_name_themselves(own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    (folder / SUMS_NAME).write_text('{"files": [{"name": "../x", "bytes": 1, "xxh3_128": "a"}]}')
    with pytest.raises(errors.DamagedCheckpointError, match=rf"{SUMS_NAME} cannot be read .*leads outside"):
        states(find_repo(folder, SourceConfig()))
