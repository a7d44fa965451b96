"""The script that checks attention implementations and measures them: what it prints is what it found."""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from rabbit_engine.diagnostics.attention_benchmark import one_pass, sample_passes, traced_attention
from rabbit_engine.diagnostics.benchmark import decode_step
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.streaming import Span, Trace
from rabbit_engine.utils.platform import is_flash_attention_available

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_attention_and_benchmark.py"
CPU = torch.device("cpu")
SHARE = re.compile(r"([\d.]+)% of a decoded token behind (\d+) tokens \(([\d.e+-]+) ms of ([\d.e+-]+) ms\)")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script in this process: importing in a new one would take longer than the work."""
    command, out, err, code = [str(SCRIPT), *map(str, arguments)], io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def measured(checkpoint: Callable[[str], Path]) -> str:
    done = run(
        "--model", checkpoint("llama"), "--benchmark", "--contexts", "16,4,400", "--rounds", 2, "--tokens", 2, "--json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the model has 256 positions" in done.stderr
    return done.stdout


def test_every_implementation_has_a_row_with_its_reason(checkpoint: Callable[[str], Path]) -> None:
    done = run("--model", checkpoint("llama"))
    assert done.returncode == 0, done.stderr
    found = {row[0]: row[1:] for row in rows(done.stdout)}
    assert found["sdpa"][0] == found["eager"][0] == "yes"
    assert found["flash_attention_2"][0] == "no"  # float32, wherever it runs
    assert "does not work here: the d" in found["flash_attention_2"][1]  # the device is cpu, the dtype is float32
    assert is_flash_attention_available()[1] in done.stdout
    assert re.search(r"^in use +sdpa \(auto: sdpa; no flash attention: the d", done.stdout, re.MULTILINE)


def test_a_class_without_sdpa_says_so(checkpoint: Callable[[str], Path]) -> None:
    done = run("--model", checkpoint("gpt_oss"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = {row[0]: row[1:] for row in rows(done.stdout)}
    assert (found["sdpa"][0], found["eager"][0]) == ("no", "yes")
    assert "no sdpa attention" in found["sdpa"][1]
    assert "eager, as GptOssForCausalLM has no sdpa" in done.stdout


def test_every_lane_is_measured_and_omissions_are_reported(measured: str) -> None:
    tables = [row for row in rows(measured) if len(row) == 7 and row[0] != "implementation"]
    for name in ("auto (sdpa)", "sdpa", "eager"):
        assert [row[1] for row in tables if row[0] == name] == ["4", "16"] * 4, "two phases, streamed and resident"
    left_out = [row for row in tables if row[0] == "flash_attention_2"]
    assert len(left_out) == 4
    assert all("left out" in row[2] for row in left_out)


def test_json_lines_hold_every_round_and_shares_of_it(measured: str) -> None:
    checks, found = records(measured)[:3], records(measured)[3:]
    assert [check["implementation"] for check in checks] == ["flash_attention_2", "sdpa", "eager"]
    assert len(found) == 3 * 2 * 2 * 2, "implementations, contexts, phases, placements"
    for record in found:
        conditions = record["conditions"]
        assert len(record["rounds_s"]) == len(conditions["attention_s"]) == len(conditions["wait_s"]) == 2
        assert all(0 < part < whole for part, whole in zip(conditions["attention_s"], record["rounds_s"], strict=True))
        assert 0 < conditions["attention_share"] < 1
        moves = conditions["placement"] == "weights from disk"
        assert (record["bytes_moved"] > 0) == (max(conditions["wait_s"]) > 0) == moves


def test_the_last_line_is_the_share_of_its_own_figures_and_of_the_record(measured: str) -> None:
    last = measured.splitlines()[-1]
    assert last.startswith("Attention itself, weights from disk: ")
    found = SHARE.search(last)
    assert found is not None, last
    percent, behind, attention_ms, whole_ms = map(float, found.groups())
    assert behind == 16
    assert 0 < percent < 100
    assert percent == pytest.approx(100 * attention_ms / whole_ms, abs=0.02)
    (record,) = (
        record["conditions"]
        for record in records(measured)
        if record.get("lane") == "weights from disk, decoding, auto, 16 tokens"
    )
    assert percent == pytest.approx(100 * record["attention_share"], abs=0.006)
    assert f"waiting for weights: {record['wait_share']:.1%}" in last


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "no/such/folder/here"), 1, "no/such/folder/here"),
        (("--device", "cpu", "--attn-implementation", "flash_attention_2"), 1, "does not work here: the device is cpu"),
        (("--device", "cpu", "--attn-implementation", "flush"), 1, "'flush' is not one of 'auto'"),
        (("--device", "no-such-device"), 1, "is not a device torch knows"),
        (("--benchmark", "--contexts", "many"), 2, "is not a list of numbers"),
        (("--benchmark", "--contexts", "256"), 2, "the model has 256 positions"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(
    arguments: tuple[str, ...], code: int, message: str, checkpoint: Callable[[str], Path]
) -> None:
    model = () if "--model" in arguments else ("--model", checkpoint("llama"))
    done = run(*model, *arguments)
    assert done.returncode == code, done.stderr
    assert message in re.sub(r"[\s│]+", " ", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_one_span_a_layer_and_the_answer_stays(
    implementation: str, checkpoint: Callable[[str], Path], streamed: Any, ids: torch.Tensor
) -> None:
    model = streamed(checkpoint("llama"), attn_implementation=implementation, profiling_mode=True)
    native = AttentionInterface.get_interface
    with torch.no_grad():
        expected = model(ids).logits
        trace = Trace(on=True)
        with traced_attention(trace, CPU):
            assert torch.equal(model(ids).logits, expected)
    assert [(span.lane, span.name) for span in trace.spans()] == [("attention", implementation)] * 3
    assert AttentionInterface.get_interface is native


def test_parts_of_a_pass_are_not_more_than_the_pass(checkpoint: Callable[[str], Path], streamed: Any) -> None:
    model = streamed(checkpoint("llama"), profiling_mode=True)
    found = sample_passes(model, decode_step(model, 8), 2)
    assert 0 < found.attention_s < found.pass_s
    assert 0 < found.wait_s < found.pass_s
    assert 0 < found.moving_s <= found.pass_s
    assert found.attention_s + found.wait_s < found.pass_s
    assert not runtime_of(model).trace.on


def test_overlapping_reads_count_once_and_those_outside_passes_not_at_all() -> None:
    spans = [
        Span("disk 0", "a", 0.0, 2.0, 100),
        Span("pass", "all", 1.0, 5.0),
        Span("disk 1", "b", 1.5, 3.0, 60),
        Span("attention", "sdpa", 3.0, 3.5),
        Span("attention", "sdpa", 4.0, 4.5),
        Span("wait", "a", 1.0, 2.0),
        Span("disk 0", "c", 4.5, 6.0, 40),
    ]
    found = one_pass(spans, 2)
    assert (found.pass_s, found.attention_s, found.wait_s, found.moving_s, found.read_bytes) == (2.0, 0.5, 0.5, 1.25, 100)
