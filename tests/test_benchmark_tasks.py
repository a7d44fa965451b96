"""The benchmark of tasks: every lane on a tiny model, each in this process in place of one of its own."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import families
import pytest
import torch
from tiny import pieces_of_words

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_tasks

Rows = list[list[str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer of words and a chat template."""
    folder = families.save("llama", tmp_path / "model")
    tokenizer = pieces_of_words(96)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.eos_token = tokenizer.pad_token = "w9"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Rows]:
    """Runs a command of the script, its lanes in this process: the cells of its table."""

    def run_here(command: list[str], **_: object) -> CompletedProcess[str]:
        module = importlib.import_module(command[2])
        monkeypatch.setattr(sys, "argv", command[2:])
        with redirect_stdout(io.StringIO()) as out:
            module.main()
        return CompletedProcess(command, 0, out.getvalue(), "")

    def rows_of(command: Callable[..., None], *arguments: object, **options: object) -> Rows:
        monkeypatch.setattr(benchmark_tasks.subprocess, "run", run_here)
        monkeypatch.setattr(benchmark_tasks, "_DISTURBED", 2.0)
        monkeypatch.setattr(importlib.import_module("peers.tasks"), "_SAMPLE_BYTES", 2**12)
        command(*arguments, **options)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]

    return rows_of


def test_every_lane_has_a_row_and_exact_ones_have_transformers_bits(bench: Any, model: Path) -> None:
    found = bench(benchmark_tasks.texts, model, count=6, rounds=1, batch=3, offloaded="2,3")
    assert [(row[0], row[1]) for row in found] == [
        (task, lane) for task in ("classify", "embed") for lane in benchmark_tasks.LANES
    ]
    assert [row[2] for row in found[:6]] == ["6", "6", "6", "6", "2", "3"]
    equal = {row[1]: row[-1] for row in found}
    assert equal["streamed, exact"] == equal["resident, one by one"] == equal["offload, one by one"] == "yes"


def test_passes_have_a_row_for_each_number_of_texts(bench: Any, model: Path) -> None:
    found = bench(benchmark_tasks.passes, model, sizes="1,2", rounds=1)
    assert [row[0] for row in found] == ["1", "1", "2", "2"]
    assert all(float(row[3]) > 0 for row in found)


def test_chats_of_a_batch_are_those_of_generate(bench: Any, model: Path) -> None:
    found = bench(benchmark_tasks.chats, model, count=3, alone=2, tokens=4)
    assert [row[:2] for row in found] == [["batch", "3"], ["generate", "2"]]
    assert found[0][-1] == "2 of 2"


def test_a_result_of_other_bits_is_not_called_equal() -> None:
    reference = torch.ones(3, 2)
    assert benchmark_tasks.difference(torch.ones(2, 2), reference) == "yes"
    assert benchmark_tasks.difference(reference + 0.25, reference) == "within 2.5e-01"


@pytest.mark.parametrize(("disturbed", "runs"), [([0.9, 0.1], 2), ([0.05], 1), ([0.9, 0.5], 2)])
def test_a_disturbed_run_is_repeated_once(monkeypatch: Any, disturbed: list[float], runs: int) -> None:
    left = iter(disturbed)
    record = '{"classify": {"s": 1.0, "others_s": %s}}'
    monkeypatch.setattr(benchmark_tasks.subprocess, "run", lambda *_, **__: CompletedProcess([], 0, record % next(left), ""))
    one = benchmark_tasks.Bench(Path(), Path(), Path(), 1, ())
    assert benchmark_tasks.disturbance(one.run("tasks")) == min(disturbed)
    assert len(list(left)) == len(disturbed) - runs
