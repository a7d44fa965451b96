"""A lane is one peer with its settings; a run is one process of it in a limited group. Prints nothing."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers.memory_group import ReadLimit, limited_group

SCRIPTS = Path(__file__).resolve().parent.parent
_group_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One peer: its runner, its Python, its model, and the settings to try; the fastest that survive are used."""

    name: str
    module: str
    python: str
    model: Path
    settings: tuple[tuple[str, ...], ...] = ((),)
    always: tuple[str, ...] = ()
    prepares: bool = False

    def command(self, *extra: str) -> list[str]:
        """The runner's command line, run from the folder that holds the package of runners."""
        return [self.python, "-m", f"peers.{self.module}", str(self.model), *self.always, *extra]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of every run: bytes of memory, seconds, how fast it reads; and the files that must not be in the page cache."""

    memory_bytes: int
    timeout_s: float
    cold: tuple[Path, ...]
    read: ReadLimit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One process: `outcome` is ok, killed (out of memory), timed out or failed; `figures` is the runner's JSON."""

    lane: str
    settings: tuple[str, ...]
    phase: str
    outcome: str
    error: str | None = None
    wall_s: float
    peak_group_bytes: int | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def token_s(self) -> float:
        """Mean seconds of the decoded tokens after the first."""
        return statistics.fmean(self.figures["token_s"])

    @property
    def read_bytes_a_token(self) -> float:
        """Bytes read from disk for each of these tokens."""
        return float(self.figures["read_bytes"]) / len(self.figures["token_s"])

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def evict(paths: Iterable[Path]) -> None:
    """Drop every file at or below `paths` from the page cache; dirty pages are written first."""
    for root in paths:
        for path in [root] if root.is_file() else root.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(handle)


def prepare_lane(lane: Lane, timeout_s: float) -> Run:
    """Load once without a limit: splitting the checkpoint is not part of the measurement."""
    start = time.perf_counter()
    outcome, error, figures = _execute(lane.command("--prepare"), timeout_s)
    return Run(
        lane=lane.name,
        settings=(),
        phase="prepare",
        outcome=outcome,
        error=error,
        wall_s=time.perf_counter() - start,
        figures=figures,
    )


def run_lane(lane: Lane, settings: tuple[str, ...], phase: str, arguments: Sequence[str], limits: Limits) -> Run:
    """One process with a cold page cache, in its own group."""
    evict(limits.cold)
    start = time.perf_counter()
    with limited_group(f"peers-{os.getpid()}-{next(_group_numbers)}", limits.memory_bytes, limits.read) as group:
        outcome, error, figures = _execute(group.joined(lane.command(*arguments, *settings)), limits.timeout_s)
        if outcome != "ok" and group.oom_kills():
            outcome, error = "killed", "out of memory"
        peak = group.peak_bytes()
    return Run(
        lane=lane.name,
        settings=settings,
        phase=phase,
        outcome=outcome,
        error=error,
        wall_s=time.perf_counter() - start,
        peak_group_bytes=peak,
        figures=figures,
    )


def _execute(command: Sequence[str], timeout_s: float) -> tuple[str, str | None, Mapping[str, Any]]:
    """`(outcome, error, figures)`: the figures are the last line on stdout, the error the last on stderr."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, cwd=SCRIPTS, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return "timed out", f"after {timeout_s:.0f} s", {}
    if done.returncode:
        return "failed", _last_line(done.stderr) or f"exit status {done.returncode}", {}
    return "ok", None, json.loads(_last_line(done.stdout))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def best_settings(trials: Sequence[Run]) -> tuple[str, ...] | None:
    """The settings of the fastest survivor; None if none survived."""
    survivors = [run for run in trials if run.outcome == "ok"]
    return min(survivors, key=lambda run: run.token_s).settings if survivors else None
