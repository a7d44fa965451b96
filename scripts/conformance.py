"""Runs transformers' own model tests on streamed models; writes a table of families, and docs/conformance.json.

`ModelTesterMixin` comes with the source distribution of the installed transformers, which pip fetches once into `.conformance/`.
`GenerationTesterMixin` does not: its tests run with a checkout of transformers, given with --transformers.
A failing test is run again on models that transformers loads whole; one that fails there too is counted separately.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".conformance"
RECORD = ROOT / "docs" / "conformance.json"
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe", "deepseek_v3",
    "gpt_oss", "glm", "gpt2", "qwen3_next", "gemma4",
)  # fmt: skip
OUTCOMES = ("passed", "failed", "fails_whole_too", "known", "skipped", "left_out")
"""`fails_whole_too`: not because of streaming. `known`: a documented refusal. `skipped`: by the test itself. `left_out`: by
scope.py."""
SEVERITY = ("failed", "known", "left_out", "skipped", "passed")
"""A test with subtests reports several times: the first of these that it reported is its outcome."""
SOURCES = {
    True: "a checkout of transformers: ModelTesterMixin and GenerationTesterMixin",
    False: "the source distribution of transformers: ModelTesterMixin; GenerationTesterMixin is not in it",
}
MISSING = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
"""Modules that `test_modeling_common` imports and the source distribution lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The outcome of one test of one family."""

    family: str
    test: str
    outcome: str
    reason: str


def find_tests(transformers: str) -> Path:
    """The folder whose `tests` package is that of this version of transformers; downloaded if missing."""
    folder = CACHE / f"transformers-{transformers}"
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            unpack_tests(download_sdist(transformers, Path(scratch)), Path(scratch) / "out")
            (Path(scratch) / "out").rename(folder)
    return folder


def download_sdist(transformers: str, folder: Path) -> Path:
    """The source distribution's archive, from pip. Without build isolation: its metadata needs only setuptools."""
    only_source = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *only_source, "--dest", str(folder)]
    subprocess.run([*command, f"transformers=={transformers}"], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def unpack_tests(archive: Path, target: Path) -> None:
    """Its `tests` as a package in `target`, with an empty mixin for each that the archive lacks."""
    target.mkdir()
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile() and member.name.split("/")[1:2] == ["tests"]]
        for member in members:
            member.name = member.name.split("/", 1)[1]
        tar.extractall(target, members, filter="data")
    for path, mixin in MISSING.items():
        stub = target / "tests" / path
        if not stub.exists():
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(f'class {mixin}:\n    """Not in the source distribution."""\n')
    for folder in (target / "tests", *(target / "tests" / path for path in MISSING)):
        ((folder if folder.is_dir() else folder.parent) / "__init__.py").touch()


def run_tests(tests: Path, family: str, names: Iterable[str] = (), *, whole: bool = False, speculate: str = "") -> list[Result]:
    """A family's tests, all or those named, in a separate process. Raises RuntimeError if pytest itself fails.

    `speculate` is the default of the models' `generate`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "record.json"
        settings = {"TESTS": str(tests), "FAMILIES": family, "RECORD": str(record), "WHOLE": "1" if whole else ""}
        settings["SPECULATE"] = speculate
        nodes = [f"conformance/test_families.py::{family}" + (f"::{name}" if name else "") for name in names or [""]]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short", *nodes],
            env={**os.environ, **{f"CONFORMANCE_{key}": value for key, value in settings.items()}}
            | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode not in (0, 1) or not record.exists():
            raise RuntimeError(f"pytest could not run {family}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
        return merge_reports(family, json.loads(record.read_text()))


def merge_reports(family: str, reports: list[dict[str, str]]) -> list[Result]:
    """One result per test: the worst of its reports."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for report in reports:
        found[report["test"].rsplit("::", 1)[-1]].append(report)
    results = []
    for test, all_of_it in found.items():
        worst = min(all_of_it, key=lambda report: SEVERITY.index(report["outcome"]))
        results.append(Result(family=family, test=test, outcome=worst["outcome"], reason=worst["reason"]))
    return results


def check_family(tests: Path, family: str, speculate: str) -> tuple[list[Result], float]:
    """A family's results and the seconds they took; failures are tried again without streaming."""
    started = time.monotonic()
    results = run_tests(tests, family, speculate=speculate)
    failed = [result.test for result in results if result.outcome == "failed"]
    control = run_tests(tests, family, failed, whole=True, speculate=speculate) if failed else []
    fails_whole = {result.test for result in control if result.outcome == "failed"}
    results = [
        Result(family=family, test=each.test, outcome="fails_whole_too", reason=each.reason) if each.test in fails_whole else each
        for each in results
    ]
    seconds = time.monotonic() - started
    print(row(family, Counter(result.outcome for result in results), seconds), flush=True)
    return results, seconds


def row(family: str, counts: Counter[str], seconds: float) -> str:
    """One line of the table."""
    return f"{family:<14}" + "".join(f"{counts[outcome]:>16}" for outcome in OUTCOMES) + f"{seconds:>9.0f} s"


def make_record(found: dict[str, tuple[list[Result], float]], source: str, seconds: float) -> dict[str, Any]:
    """Versions, counts, and every test that did not run, with its reason."""
    results = [result for family, _ in found.values() for result in family]
    packages = ("rabbit_engine", "transformers", "torch", "pytest")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "source": source,
        "seconds": round(seconds),
        "families": {
            family: {**{name: Counter(each.outcome for each in tests)[name] for name in OUTCOMES}, "seconds": round(took)}
            for family, (tests, took) in found.items()
        },
        "passed": by_test(results, "passed"),
        "failed": listed(results, "failed"),
        "fails_whole_too": listed(results, "fails_whole_too"),
        "known": listed(results, "known"),
        "left_out": by_reason(results, "left_out"),
        "skipped": by_reason(results, "skipped"),
    }


def by_test(results: list[Result], outcome: str) -> dict[str, int]:
    """The number of families with that outcome per test; the variants of a parameterised test together."""
    return dict(sorted(Counter(without_variant(each.test) for each in results if each.outcome == outcome).items()))


def by_reason(results: list[Result], outcome: str) -> dict[str, dict[str, int]]:
    """The same, grouped by reason. Class names in a reason are removed, so that families share it."""
    grouped: dict[str, list[Result]] = defaultdict(list)
    for each in results:
        if each.outcome == outcome:
            grouped[re.sub(r"<class '[\w.]+'>|\b\w+(ForCausalLM|LMHeadModel)\b", "the model", each.reason)].append(each)
    return {reason: by_test(group, outcome) for reason, group in sorted(grouped.items())}


def listed(results: list[Result], outcome: str) -> list[dict[str, str]]:
    """Each test with that outcome, and the first line of its error."""
    return [
        {"family": each.family, "test": each.test, "reason": each.reason.split("\n")[0]}
        for each in results
        if each.outcome == outcome
    ]


def without_variant(test: str) -> str:
    """`test_x_03_fp16` is a variant of `test_x`."""
    return re.sub(r"(?<!flash_attn)(?<!flash_attention)_\d+(_\w+)?$", "", test)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES, help="names in tests/families.py; all by default")
    parser.add_argument("--transformers", type=Path, help="a checkout of transformers, at the tag of the installed version")
    parser.add_argument(
        "--speculate", choices=["auto", "lookup"], default="", help="the default of the models' generate, with one text a batch"
    )
    parser.add_argument("--jobs", type=int, default=2, help="families at a time")
    parser.add_argument(
        "--record",
        type=Path,
        help="output file; by default, a run of all families without --speculate writes docs/conformance.json",
    )
    return parser.parse_args()


def main() -> int:
    """Run, print, record; 1 if a streamed model fails a test that a whole one passes."""
    arguments = parse_arguments()
    started = time.monotonic()
    tests = arguments.transformers or find_tests(version("transformers"))
    check = partial(check_family, tests, speculate=arguments.speculate)
    print(f"{'family':<14}" + "".join(f"{outcome:>16}" for outcome in OUTCOMES))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = dict(zip(arguments.families, pool.map(check, arguments.families), strict=True))
    seconds = time.monotonic() - started
    results = [result for family, _ in found.values() for result in family]
    print(row("all", Counter(result.outcome for result in results), seconds))
    record = arguments.record or (RECORD if tuple(arguments.families) == FAMILIES and not arguments.speculate else None)
    if record:
        record.write_text(json.dumps(make_record(found, SOURCES[bool(arguments.transformers)], seconds), indent=1) + "\n")
    for each in listed(results, "failed"):
        print(f"failed: {each['family']}::{each['test']}: {each['reason']}")
    return int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
