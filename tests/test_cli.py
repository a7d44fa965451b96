"""The command line: text on stdout, everything else on stderr, one line for an error."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rabbit_engine.cli.run import parse_memory, sampling

RABBIT = [sys.executable, "-c", "from rabbit_engine.cli import main; main()"]


def rabbit(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RABBIT, *map(str, arguments)], capture_output=True, text=True, input=stdin, timeout=300, check=False)


@pytest.fixture(scope="module")
def model(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / smollm.name).symlink_to(smollm)
    return folder


def test_run_streams_the_answer_to_stdout_alone(model: Path) -> None:
    done = rabbit("run", model, "What is the capital of France?", "--max-new-tokens", 12, "--device", "cpu")
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr


def test_run_without_the_chat_template_goes_on_with_the_text(model: Path) -> None:
    done = rabbit(
        "run", model, "-", "--no-chat", "--max-new-tokens", 5, "--max-memory", "200MB", stdin="The capital of France is"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris")


def test_demo_answers_paris_and_says_what_it_took(smollm: Path) -> None:
    done = rabbit("demo", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    for words in ("weights of the model", "held at once", "streamed", "bytes read", "seconds a token"):
        assert words in done.stderr.lower()


def test_split_then_verify_then_a_flipped_bit(own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("llama")
    done = rabbit("split", folder, "--saving-path", tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 shards, ")
    (made,) = (tmp_path / "shards").glob("llama-*/float32")
    for target in (tmp_path / "shards", made):
        done = rabbit("verify", target)
        assert (done.returncode, "6 of 6 shards are whole" in done.stdout) == (0, True)
    path = made / "model.layers.0.safetensors"
    raw = bytearray(path.read_bytes())
    raw[9000] ^= 1
    path.write_bytes(raw)
    done = rabbit("verify", tmp_path / "shards")
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "5 of 6 shards are whole" in done.stdout
    path.unlink()
    assert rabbit("split", folder, "--saving-path", tmp_path / "shards").returncode == 0
    assert rabbit("verify", tmp_path / "shards").returncode == 0


def test_verify_of_a_model_finds_its_split(own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama")
    assert rabbit("split", folder).returncode == 0
    assert rabbit("verify", folder).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "/no/such/model", "hi"), 1, "error: /no/such/model is no folder here"),
        (("verify", "/tmp/no-such-folder"), 1, "error: /tmp/no-such-folder is no folder here"),
        (("run", "/tmp", "hi", "--device", "cuda:99"), 1, "error: device='cuda:99' is not here"),
        (("run", "/tmp"), 2, "prompt"),
        (("nonsense",), 2, "no such command"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(arguments: tuple[str, ...], code: int, words: str) -> None:
    done = rabbit(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_options_as_text() -> None:
    assert parse_memory(None) is None
    assert parse_memory("8GiB") == {0: "8GiB", "cpu": "8GiB"}
    assert parse_memory("0=8GiB,cpu=24GiB") == {0: "8GiB", "cpu": "24GiB"}
    assert sampling(None, None, None, None) == {"do_sample": False}
    assert sampling(0.7, None, 5, 3) == {"do_sample": True, "temperature": 0.7, "top_k": 5}


def test_version_and_help() -> None:
    assert rabbit("--version").stdout.strip() == "0.1.0"
    assert all(word in rabbit("--help").stdout for word in ("run", "plan", "demo", "split", "verify"))
    assert shutil.which("rabbit", path=str(Path(sys.executable).parent))
