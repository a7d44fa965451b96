"""Examines this machine: what it has for running models, what prevents them, and their speed, as findings with advice.
Measures only; prints nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rabbit_engine.diagnostics.device_rates import judge_kernels, judge_link, products_of, try_device
from rabbit_engine.diagnostics.encodings import measure_encodings
from rabbit_engine.diagnostics.finding import Examination, Finding, Number
from rabbit_engine.diagnostics.pace import KNOWN_SHAPES, Pace, Shape, estimate_paces
from rabbit_engine.errors import ConfigurationError, RabbitError, first_line
from rabbit_engine.storage.directio import CHUNK_BYTES
from rabbit_engine.streaming.transfer.disk_rate import ROUNDS, SAMPLE_BYTES, DiskRate, measure_disk_rate
from rabbit_engine.streaming.transfer.ring import READERS
from rabbit_engine.utils.platform import (
    IN_MEMORY,
    best_device,
    file_system_of,
    free_memory_bytes,
    is_accelerator,
    is_flash_attention_available,
    own_memory_bytes,
)
from rabbit_engine.utils.sizes import format_bytes, format_rate
from rabbit_engine.utils.speeds import Speeds

_DISTRIBUTION = "rabbit_engine"
_MAIN_PACKAGES = ("torch", "transformers")
DRIVER_FILE = Path("/proc/driver/nvidia/version")

SLOW_DISK = 1e9
"""Bytes per second. Below this, a bf16 model of 7 billion parameters takes more than a quarter of a minute per token."""

_LITTLE_DISK_BYTES = 20 * 10**9
"""The size of a bf16 model of 7 billion parameters, and a little more."""

_LITTLE_MEMORY_BYTES = 2 * 10**9
"""A process with torch, and the smallest budget of a model of 32 billion parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis(Examination):
    """This machine. The disk is that of `folder`; `paces` are estimates for well-known models on `device`."""

    folder: Path
    device: str
    paces: tuple[Pace, ...]
    speeds: Speeds
    disk_free_bytes: int

    def facts(self) -> dict[str, Any]:
        """For JSON; rates are in bytes per second."""
        return {
            "folder": str(self.folder),
            "disk_free_bytes": self.disk_free_bytes,
            "device": self.device,
            "speeds": asdict(self.speeds),
            "paces": [asdict(pace) for pace in self.paces],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuda:
    """What torch and the driver report: `built_for` is torch's CUDA (or ROCm), None in a CPU build; `seen` are the GPUs that
    the driver lists, `devices` those that torch can use, and `problem` is why there are none."""

    torch_version: str
    built_for: str | None
    devices: tuple[str, ...] = ()
    driver: str | None = None
    seen: tuple[str, ...] = ()
    problem: str = ""


def find_folder(folder: Path | None) -> Path:
    """The given folder, else the Hub's cache, next to which shards are written; if that does not exist yet, its nearest
    existing parent. Raises ConfigurationError if the given one does not exist."""
    if folder is not None:
        if not folder.expanduser().is_dir():
            raise ConfigurationError(f"{folder} is not a folder: name one for weights")
        return folder.expanduser().resolve()
    cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    return next(place for place in (cache, *cache.parents) if place.is_dir()).resolve()


def examine(
    folder: Path, sample_bytes: int = SAMPLE_BYTES, rounds: int = ROUNDS, shapes: Mapping[str, Shape] = KNOWN_SHAPES
) -> Diagnosis:
    """Run every check, and estimate the speed of models of these `shapes`. Reads the disk of `folder` in rounds of
    `sample_bytes`."""
    device, free = best_device(), shutil.disk_usage(folder).free
    asked = _ask_machine(device, folder)
    disk = _try_disk(folder, sample_bytes, rounds)
    link, products, computing = try_device(device)
    rates = measure_encodings(device) if products else ()
    speeds = Speeds(disk=disk.median, link=link, source="measured") if isinstance(disk, DiskRate) else Speeds(link=link)
    return Diagnosis(
        folder=folder,
        device=str(device),
        findings=(*asked, judge_direct_reads(disk), judge_disk(disk), judge_link(device, link), computing, judge_kernels(rates)),
        paces=estimate_paces(device, speeds, products_of(products, rates), shapes) if products else (),
        speeds=speeds,
        disk_free_bytes=free,
    )


def _ask_machine(device: torch.device, folder: Path) -> list[Finding]:
    """The checks without measurements."""
    return [
        *check_versions(importlib.metadata.version),
        judge_cuda(find_cuda()),
        *check_memory(device),
        check_flash_attention(),
        check_bitsandbytes(),
        check_folder(folder),
    ]


def check_versions(version_of: Callable[[str], str]) -> Iterator[Finding]:
    """Check Python and all required packages against the ranges in our own metadata."""
    try:
        required, pythons = _required(), importlib.metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        advice = "pip install -e . in the folder with its pyproject.toml"
        yield Finding(name="packages", status="warn", value="ranges unknown: rabbit_engine is not installed", advice=advice)
        return
    yield _judge_python(SpecifierSet(pythons or ""))
    found = {name: _version_or_none(name, version_of) for name in required}
    for name in _MAIN_PACKAGES:
        yield _judge_packages(name, [required[name]], found)
    yield _judge_packages("packages", [need for name, need in required.items() if name not in _MAIN_PACKAGES], found)


def _required(extra: str = "") -> dict[str, Requirement]:
    """Our requirements by name, including those of `extra`."""
    needs = [Requirement(text) for text in importlib.metadata.requires(_DISTRIBUTION) or ()]
    return {need.name: need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})}


def _version_or_none(name: str, version_of: Callable[[str], str]) -> str | None:
    try:
        return version_of(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _judge_python(supported: SpecifierSet) -> Finding:
    version = platform.python_version()
    numbers = {"version": version, "supported": str(supported)}
    if supported.contains(version, prereleases=True):
        return Finding(name="python", status="ok", value=version, numbers=numbers)
    advice = f"create a virtual environment with Python {supported}"
    return Finding(name="python", status="fail", value=f"{version} is not supported", numbers=numbers, advice=advice)


def _judge_packages(name: str, needs: Sequence[Requirement], found: Mapping[str, str | None]) -> Finding:
    """One finding for all `needs`: `fail` if one is missing or out of its range."""
    wrong = [need for need in needs if not _fits(need, found[need.name])]
    words = [f"{need.name} {found[need.name] or 'is missing'}" for need in needs]
    value = ", ".join(words) if len(words) > 1 else found[needs[0].name] or "missing"
    numbers: dict[str, Number] = {need.name: found[need.name] for need in needs}
    if not wrong:
        return Finding(name=name, status="ok", value=value, numbers=numbers)
    advice = "pip install " + " ".join(f'"{need.name}{need.specifier}"' for need in wrong)
    return Finding(name=name, status="fail", value=value, numbers=numbers, advice=advice)


def _fits(need: Requirement, version: str | None) -> bool:
    return version is not None and need.specifier.contains(version, prereleases=True)


def find_cuda() -> Cuda:
    """Ask torch, and the driver separately: a CPU build of torch cannot see it."""
    driver, seen = ask_driver()
    built_for = torch.version.cuda or torch.version.hip
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if built_for else []
    problem = _cuda_problem() if built_for and driver and not torch.cuda.is_available() else ""
    return Cuda(
        torch_version=torch.__version__,
        built_for=built_for,
        devices=() if problem else tuple(devices),
        driver=driver,
        seen=seen,
        problem=problem,
    )


def ask_driver(version_file: Path = DRIVER_FILE) -> tuple[str | None, tuple[str, ...]]:
    """The NVIDIA driver's version and the names of its GPUs; None without a driver."""
    program = shutil.which("nvidia-smi")
    question = ("--query-gpu=driver_version,name", "--format=csv,noheader")
    if program is not None:
        try:
            done = subprocess.run((program, *question), capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
            rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
            if rows:
                return rows[0][0], tuple(name for _, name in rows)
        except (OSError, subprocess.SubprocessError):  # it is broken, but the kernel may still know the version
            pass
    try:
        match = re.search(r"^NVRM version:.*?\s(\d+\.[\d.]+)", version_file.read_text())
    except OSError:
        match = None
    return (match[1] if match else None), ()


def _cuda_problem() -> str:
    """Why a torch built for CUDA has no device."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "no device is visible"


def judge_cuda(cuda: Cuda) -> Finding:
    """Whether torch uses the GPU that the driver lists."""
    numbers: dict[str, Number] = {"built_for": cuda.built_for, "driver": cuda.driver, "devices": cuda.devices, "seen": cuda.seen}
    driver = f"driver {cuda.driver}" if cuda.driver else "no NVIDIA driver"
    seen = f"{driver} shows {', '.join(cuda.seen)}" if cuda.seen else driver
    if cuda.devices:
        value = f"{', '.join(cuda.devices)}; torch is built for {cuda.built_for}, {driver}"
        return Finding(name="cuda", status="ok", value=value, numbers=numbers)
    if cuda.driver is None:
        best = best_device()
        other = "the CPU" if best.type == "cpu" else best.type
        return Finding(name="cuda", status="info", value=f"{driver} was found: models run on {other}", numbers=numbers)
    if cuda.built_for is None:
        value = f"torch {cuda.torch_version} is a CPU build, although {seen}"
        advice = "pip uninstall torch, then pip install torch as https://pytorch.org/get-started/locally says for CUDA"
        return Finding(name="cuda", status="warn", value=value, numbers=numbers, advice=advice)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    advice = f"update the driver, or install a torch built for an older CUDA than {cuda.built_for}"
    advice = advice if hidden is None else f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it; else {advice}"
    value = f"torch cannot use {seen} ({cuda.problem})"
    return Finding(name="cuda", status="warn", value=value, numbers=numbers, advice=advice)


def check_memory(device: torch.device) -> Iterator[Finding]:
    """Memory of the GPUs, and of the host as far as this process may use it."""
    count = torch.accelerator.device_count() if is_accelerator(device) else 0
    pairs = [pair for index in range(count) if (pair := own_memory_bytes(torch.device(device.type, index)))]
    if pairs:
        holder = "see what uses it with nvidia-smi" if device.type == "cuda" else "close what uses it"
        yield _judge_memory("vram", [free for free, _ in pairs], [total for _, total in pairs], holder)
    free, total = free_memory_bytes(torch.device("cpu")), psutil.virtual_memory().total
    yield _judge_memory("ram", [free], [total], "close what uses it, or raise the limit of this container")


def _judge_memory(name: str, free: Sequence[int], total: Sequence[int], advice: str) -> Finding:
    value = "; ".join(f"{format_bytes(some)} free of {format_bytes(whole)}" for some, whole in zip(free, total, strict=True))
    little = free[0] < _LITTLE_MEMORY_BYTES
    return Finding(
        name=name,
        status="warn" if little else "ok",
        value=value,
        numbers={"free_bytes": free, "total_bytes": total},
        advice=advice if little else "",
    )


def check_flash_attention() -> Finding:
    """Whether its kernel runs, or why not."""
    runs, why = is_flash_attention_available()
    numbers: dict[str, Number] = {"runs": runs, "version": _version_or_none("flash-attn", importlib.metadata.version)}
    if runs:
        return Finding(name="flash-attn", status="ok", value=why, numbers=numbers)
    broken = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    repair = "pip install --force-reinstall --no-build-isolation flash-attn builds it for this torch; or uninstall it"
    advice = repair if broken else "optional: without it, attention uses sdpa"
    return Finding(name="flash-attn", status="warn" if broken else "info", value=why, numbers=numbers, advice=advice)


def check_bitsandbytes() -> Finding:
    """For information: only some checkpoints need it."""
    version = _version_or_none("bitsandbytes", importlib.metadata.version)
    needed = "BitsAndBytesConfig and int8 checkpoints use it"
    value = f"{version}; {needed}" if version else f"not installed; {needed}"
    advice = "" if version else 'optional: pip install "rabbit_engine[bnb]"'
    return Finding(name="bitsandbytes", status="info", value=value, numbers={"version": version}, advice=advice)


def check_folder(folder: Path) -> Finding:
    """The disk of the folder, and whether a model fits there."""
    free, kind, writable = shutil.disk_usage(folder).free, file_system_of(folder), os.access(folder, os.W_OK)
    numbers: dict[str, Number] = {"free_bytes": free, "file_system": kind, "writable": writable}
    value = f"{folder} ({kind or 'unknown file system'}), {format_bytes(free)} free"
    elsewhere = "set HF_HOME to a folder on a local disk, or pass --folder"
    advice = ""
    if kind in IN_MEMORY:
        value, advice = (
            f"{value}: it is memory, not a disk",
            f"weights there use the memory that streaming saves: {elsewhere}",
        )
    elif not writable:
        value, advice = f"{value}; it is not writable", f"nothing can be downloaded or split there: {elsewhere}"
    elif free < _LITTLE_DISK_BYTES:
        advice = f"free some space, a model of 7 billion parameters takes 15 GB: `hf cache prune` helps; or {elsewhere}"
    return Finding(name="folder", status="warn" if advice else "ok", value=value, numbers=numbers, advice=advice)


def _try_disk(folder: Path, sample_bytes: int, rounds: int) -> DiskRate | str:
    """The rate, or why it could not be measured."""
    try:
        return measure_disk_rate(folder, sample_bytes, rounds)
    except (OSError, RabbitError) as error:
        return first_line(error)


def judge_direct_reads(disk: DiskRate | str) -> Finding:
    """Whether reads bypass the page cache."""
    name = "direct reads"
    if isinstance(disk, str):
        return Finding(name=name, status="info", value="not known", numbers={"direct": None})
    if disk.buffered is None:
        return Finding(name=name, status="ok", value="they work: weights bypass the page cache", numbers={"direct": True})
    value = f"reads go through the page cache: {disk.buffered}"
    advice = "the CPU copies every byte once more: keep weights on a local ext4, xfs or btrfs"
    return Finding(name=name, status="warn", value=value, numbers={"direct": False}, advice=advice)


def judge_disk(disk: DiskRate | str) -> Finding:
    """How fast weights can be read from the folder's disk."""
    name = "disk rate"
    if isinstance(disk, str):
        advice = "pass --folder with a folder on the disk for weights that has room for a scratch file"
        return Finding(name=name, status="warn", value=f"not measured: {disk}", numbers={"rate": None}, advice=advice)
    slowest, fastest, what = min(disk.rounds), max(disk.rounds), "buffered" if disk.buffered else "direct"
    numbers: dict[str, Number] = {
        "rate": disk.median,
        "slowest": slowest,
        "fastest": fastest,
        "rounds": disk.rounds,
        "sample_bytes": disk.sample_bytes,
        "read_bytes": CHUNK_BYTES,
        "reads_at_once": READERS,
        "direct": disk.buffered is None,
        "file": str(disk.file) if disk.file else None,
    }
    value = (
        f"{format_rate(disk.median, 1)}, the median of {len(disk.rounds)} rounds ({slowest / 1e9:.2f} to {fastest / 1e9:.2f}): "
        f"{READERS} {what} reads of {CHUNK_BYTES // 2**20} MiB under way, {format_bytes(disk.sample_bytes)} of "
        f"{'an existing file' if disk.file else 'a scratch file'}"
    )
    slow = disk.median < SLOW_DISK
    advice = "an NVMe disk reaches 3 to 14 GB/s: set HF_HOME to a folder on one" if slow else ""
    return Finding(name=name, status="warn" if slow else "ok", value=value, numbers=numbers, advice=advice)
