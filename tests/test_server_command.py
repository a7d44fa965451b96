"""`rabbit serve` serves until it is stopped, and refuses wrong options before it loads."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from serving import NAME
from smol import user


def rabbit(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from rabbit_engine.cli import main; main()", "serve", *map(str, arguments)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )


def test_the_command_serves_until_it_is_stopped(smollm: Path, smollm_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    process = rabbit(
        *(smollm, "--port", 0, "--name", NAME, "--max-memory", "150MB", "--api-key-file", tmp_path / "key"),
        *("--saving-path", smollm_shards, "--speculate"),
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith(f"{NAME}: http"))
        base = line.split()[1]
        client = openai.OpenAI(base_url=f"{base}v1", api_key="secret", timeout=120)
        stream = client.chat.completions.create(model=NAME, messages=user("Count to a thousand."), stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "api-key-file"),
        (["--api-key-file", "/nowhere/key"], "cannot read"),
        (["--overflow", "maybe"], "'--overflow'"),
    ],
)
def test_serve_refuses_wrong_options_before_it_loads(arguments: list[str], says: str) -> None:
    process = rabbit("no-such-model-anywhere", *arguments)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert says in told
    assert "Traceback" not in told


def test_a_port_in_use_is_reported_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = rabbit("no-such-model-anywhere", "--port", taken.getsockname()[1])
        _, told = process.communicate(timeout=120)
    assert "cannot listen" in told
