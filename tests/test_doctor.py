"""`rabbit doctor`: findings of this machine, each with what to do; a scratch file that never stays; paces as planned."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from rabbit_engine.cli.app import app
from rabbit_engine.config import StreamConfig
from rabbit_engine.diagnostics import doctor, pace
from rabbit_engine.diagnostics.device_rates import judge_kernels
from rabbit_engine.diagnostics.doctor import (
    Cuda,
    Diagnosis,
    check_folder,
    check_versions,
    examine,
    find_folder,
    judge_cuda,
    judge_disk,
)
from rabbit_engine.diagnostics.finding import Finding
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.quantization.kernels import kernels_in_use, torch_operations
from rabbit_engine.streaming.transfer import disk_rate as diskrate
from rabbit_engine.streaming.transfer.disk_rate import find_large_file, measure_disk_rate, scratch_file
from rabbit_engine.utils.speeds import Speeds

SAMPLE = 3 * 2**20
CPU = torch.device("cpu")
SMALL = "Qwen2.5-7B"
FAST = pace.Products(1e15, 1e15)
NAMES = ["python", "torch", "transformers", "packages", "cuda", "ram", "flash-attn", "bitsandbytes", "folder"]
NAMES += ["direct reads", "disk rate", "link rate", "compute rate", "kernels"]

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    return examine(tmp_path_factory.mktemp("disk"), SAMPLE, 2, {SMALL: pace.KNOWN_SHAPES[SMALL]})


def test_every_check_has_a_finding_and_every_problem_has_advice(found: Diagnosis) -> None:
    assert [finding.name for finding in found.findings if finding.name != "vram"] == NAMES
    assert all(finding.value for finding in found.findings)
    assert all(finding.advice for finding in found.findings if finding.status in ("warn", "fail"))
    assert found.can_run


def test_json_holds_every_number(found: Diagnosis) -> None:
    told = json.loads(json.dumps(found.as_dict()))
    assert set(told) == {"version", "can_run", "folder", "disk_free_bytes", "device", "findings", "speeds", "paces"}
    assert all(set(finding) == {"name", "status", "value", "numbers", "advice"} for finding in told["findings"])
    numbers = {finding["name"]: finding["numbers"] for finding in told["findings"]}
    assert numbers["torch"] == {"torch": importlib.metadata.version("torch")}
    assert numbers["ram"]["total_bytes"] == [psutil.virtual_memory().total]
    disk = numbers["disk rate"]
    assert (disk["sample_bytes"], len(disk["rounds"]), disk["read_bytes"], disk["reads_at_once"]) == (SAMPLE, 2, 8 * 2**20, 6)
    assert disk["slowest"] <= disk["rate"] <= disk["fastest"]
    assert told["speeds"]["disk"] == disk["rate"]
    assert numbers["compute rate"]["rate"] > 0
    assert told["paces"][0]["model"] == SMALL


def test_the_command_prints_findings_and_paces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda folder, *_: examine(folder, SAMPLE, 2, {SMALL: pace.KNOWN_SHAPES[SMALL]}))
    done = CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path), "--quick"])
    assert done.exit_code == 0, done.output
    assert all(name in done.stdout for name in NAMES)
    assert re.search(rf"{SMALL} +15.2 GB ", done.stdout)
    assert '"flash-attn>=' in done.stdout or doctor.is_flash_attention_available()[0]
    told = json.loads(CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path), "--quick", "--json"]).stdout)
    assert told["can_run"] is True


def test_exit_code_is_1_if_models_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda folder, *_: examine(folder, SAMPLE, 2, {}))
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1" if name == "transformers" else real(name))
    done = CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path), "--quick", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["can_run"] is False


def test_a_missing_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a folder"):
        find_folder(tmp_path / "absent")
    done = CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path / "absent")])
    assert (type(done.exception), done.stdout) == (ConfigurationError, "")  # which `main` prints in one line


def test_without_a_folder_the_hub_cache_is_measured_or_where_it_would_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_folder(None) == tmp_path.resolve()
    (tmp_path / "hub").mkdir()
    assert find_folder(None) == (tmp_path / "hub").resolve()


def status_of(versions: dict[str, str | None]) -> dict[str, Finding]:
    def version_of(name: str) -> str:
        version = versions.get(name, importlib.metadata.version(name))
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    return {finding.name: finding for finding in check_versions(version_of)}


def test_versions_are_held_against_our_own_metadata() -> None:
    assert {finding.status for finding in status_of({}).values()} == {"ok"}
    low = status_of({"torch": "2.3.0", "transformers": "6.0.0", "safetensors": None})
    assert {name: finding.status for name, finding in low.items()} == {
        "python": "ok",
        "torch": "fail",
        "transformers": "fail",
        "packages": "fail",
    }
    needs = {text.partition(">")[0].partition("<")[0]: text for text in importlib.metadata.requires("rabbit_engine") or ()}
    assert low["torch"].advice == f'pip install "{needs["torch"]}"'
    assert low["packages"].advice == f'pip install "{needs["safetensors"]}"'
    assert "safetensors is missing" in low["packages"].value
    assert status_of({"torch": "99.0+cu999"})["torch"].status == "ok"


@pytest.mark.parametrize(
    ("cuda", "status", "words"),
    [
        (Cuda(torch_version="2.13.0+cpu", built_for=None), "info", "no NVIDIA driver"),
        (Cuda(torch_version="2.13.0", built_for="13.0"), "info", "no NVIDIA driver"),
        (Cuda(torch_version="2.13.0+cpu", built_for=None, driver="570.86", seen=("RTX",)), "warn", "CPU build, although"),
        (Cuda(torch_version="2.13.0", built_for="13.0", driver="470.1", problem="too old"), "warn", "too old"),
        (Cuda(torch_version="2.13.0", built_for="13.0", driver="580.1", devices=("RTX",)), "ok", "driver 580.1"),
    ],
)
def test_torch_and_driver_are_held_against_each_other(cuda: Cuda, status: str, words: str) -> None:
    finding = judge_cuda(cuda)
    assert (finding.status, words in finding.value) == (status, True)
    assert bool(finding.advice) == (status == "warn")


@linux
def test_the_driver_is_asked_although_torch_is_a_cpu_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, version = tmp_path / "nvidia-smi", tmp_path / "version"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program.write_text("#!/bin/sh\necho '570.86.15, NVIDIA H200'\necho '570.86.15, NVIDIA L4'\n")
    program.chmod(0o755)
    assert doctor.ask_driver(version) == ("570.86.15", ("NVIDIA H200", "NVIDIA L4"))
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    assert doctor.ask_driver(version) == (None, ())
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC 12\n")
    assert doctor.ask_driver(version) == ("535.129.03", ())
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n")
    assert doctor.ask_driver(version) == ("550.54.15", ())


def test_a_large_file_of_the_folder_is_read_and_small_or_hollow_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 1000)
    with (tmp_path / "hollow").open("wb") as hollow:
        hollow.truncate(4 * SAMPLE)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "link").symlink_to(tmp_path / "weights")
    assert find_large_file(tmp_path, SAMPLE) is None
    (tmp_path / "below" / "weights").write_bytes(os.urandom(2 * SAMPLE + 5))
    assert find_large_file(tmp_path, SAMPLE) == tmp_path / "below" / "weights"
    rate = measure_disk_rate(tmp_path, SAMPLE, 4)
    assert (rate.file, len(rate.rounds), rate.sample_bytes) == (tmp_path / "below" / "weights", 4, SAMPLE)
    assert min(rate.rounds) <= rate.median <= max(rate.rounds)


@linux
def test_rounds_fetch_every_byte_of_the_sample_from_the_disk(tmp_path: Path) -> None:
    nbytes, rounds = 20 * 2**20 + 4096, 2
    chunks = diskrate.sample_chunks(tmp_path / "weights", 2**30, nbytes)
    assert [chunk.offset - 2**30 for chunk in chunks] == [0, 8 << 20, 16 << 20]
    assert [chunk.nbytes for chunk in chunks] == [8 << 20, 8 << 20, (4 << 20) + 4096]
    if check_folder(tmp_path).status == "warn":
        pytest.skip("the folder for tests is in memory")
    before = fetched_bytes()
    measure_disk_rate(tmp_path, nbytes, rounds)
    assert fetched_bytes() - before >= (1 + rounds) * nbytes


def fetched_bytes() -> int:
    """What this process made disks read."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"])


@pytest.mark.parametrize("own_files", [diskrate.OWN_FILES, Path("/no/such/folder")], ids=["as here", "named"])
def test_the_scratch_file_is_random_whole_and_gone_even_when_interrupted(own_files: Path, tmp_path: Path) -> None:
    kept = []
    for _ in range(2):
        with scratch_file(tmp_path, SAMPLE, own_files) as path:
            kept.append(path.read_bytes())
            assert path.stat().st_blocks * 512 >= SAMPLE
    assert (len(kept[0]), kept[0] != kept[1]) == (SAMPLE, True)
    assert all(len(set(kept[0][start : start + 4096])) > 200 for start in range(0, SAMPLE, 2**20))
    with pytest.raises(KeyboardInterrupt), scratch_file(tmp_path, SAMPLE, own_files):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_an_ended_run_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    code = (  # a shell's background job ignores Ctrl-C, and so would what it starts
        "import signal, sys, pathlib, rabbit_engine.streaming.transfer.disk_rate as d; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "d.measure_disk_rate(pathlib.Path(sys.argv[1]), 2**27, 500)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not holds_file_in(process.pid, tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holds_file_in(process.pid, tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


def holds_file_in(pid: int, folder: Path) -> bool:
    try:
        return any(str(link.readlink()).startswith(str(folder)) for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


@linux
def test_a_folder_that_cannot_be_written_is_a_finding() -> None:
    told = {finding.name: finding for finding in examine(Path("/proc/self/fdinfo"), SAMPLE, 1, {}).findings}
    assert (told["disk rate"].status, told["disk rate"].numbers) == ("warn", {"rate": None})
    assert "not measured: " in told["disk rate"].value
    assert told["direct reads"].status == "info"


@linux
def test_a_folder_in_memory_is_distinguished_from_a_disk() -> None:
    finding = check_folder(Path("/dev/shm"))
    assert (finding.status, finding.numbers["file_system"]) == ("warn", "tmpfs")
    assert "not a disk" in finding.value
    assert measure_disk_rate(Path("/dev/shm"), SAMPLE, 1).median > 0


@pytest.mark.usefixtures("without_direct_reads")
def test_reads_through_the_page_cache_are_flagged(tmp_path: Path) -> None:
    rate = measure_disk_rate(tmp_path, SAMPLE, 1)
    assert rate.buffered is not None
    assert doctor.judge_direct_reads(rate).status == "warn"
    assert "buffered reads" in judge_disk(rate).value
    assert judge_disk(rate).numbers["direct"] is False


def test_a_disk_without_room_is_a_finding_and_a_little_room_is_not_filled(tmp_path: Path) -> None:
    free = diskrate.shutil.disk_usage(tmp_path).free
    assert diskrate.room_for(tmp_path, 2 * free) <= free // 2 + 2**30
    with pytest.raises(OSError, match="too little for a sample"):
        diskrate.room_for(Path("/proc"), 2**30)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen2.5-7B", 7.615616512), ("Qwen3-30B-A3B", 30.532122624), ("Llama-3.1-405B", 405.853388800)],
)
def test_known_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    budget = StreamConfig(device=CPU, device_budget_bytes=8 * 10**9, speeds=Speeds(disk=2e9))
    made = pace.estimate_pace(name, pace.KNOWN_SHAPES[name], budget, products=FAST)
    assert made.parameters == round(billions * 1e9)
    assert made.bound == "disk"
    assert made.pass_bytes is not None
    assert made.token_s is not None
    assert made.token_s[1] == made.pass_bytes / 2e9
    assert made.token_s[0] <= made.token_s[1]
    expert_share = 1 if "A3B" not in name else 0.1
    assert made.pass_bytes == pytest.approx(expert_share * made.weights_bytes - 7e9, abs=5e9)


def test_paces_follow_memory_compute_and_the_smallest_budget() -> None:
    shape = pace.KNOWN_SHAPES[SMALL]
    smallest = pace.estimate_pace(SMALL, shape, StreamConfig(device=CPU, device_budget_bytes=10**9), FAST).smallest_bytes
    for budget, bound in ((smallest - 10**6, "memory"), (smallest, "disk"), (10**11, "compute")):
        made = pace.estimate_pace(SMALL, shape, StreamConfig(device=CPU, device_budget_bytes=budget, max_seq_len=1024), FAST)
        assert made.bound == bound
        assert (made.token_s is None) == (bound == "memory")
    slow = pace.estimate_pace(
        SMALL, shape, StreamConfig(device=CPU, device_budget_bytes=10**11), products=pace.Products(1e9, 1e9)
    )
    assert slow.token_s == pytest.approx((14.14, 14.14), abs=0.01)  # all but the embedding, at a gigabyte a second
    assert slow.four_bit_token_s == pytest.approx(
        4.36, abs=0.01
    )  # 3.67 of layers, 0.55 of the head in eight bits, small ones in bf16
    assert slow.four_bit_bytes == pytest.approx(4.36e9 + 1.09e9, abs=0.01e9)  # the embedding, in bf16


def test_kernels_and_their_rates_are_named(found: Diagnosis) -> None:
    finding = next(finding for finding in found.findings if finding.name == "kernels")
    assert finding.numbers["kernels"] == kernels_in_use()
    rate = r"[\d.]+( \([\d.]+ fused\))?"
    assert re.search(rf"4bit {rate}, 8bit {rate}, lossless {rate}, FP8 {rate}, GGUF Q4_K {rate}, nf4 {rate}$", finding.value)
    assert all(finding.numbers[f"{name} decode_rate"] > 0 for name in ("4bit", "lossless", "nf4"))
    with torch_operations():
        assert '"rabbit_engine[cpu]"' in judge_kernels(()).advice
