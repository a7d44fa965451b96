"""`make test-newest` and `make test-lowest` leave out only what says nothing new."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sampling

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import newest_tests  # noqa: E402

FILES = [f"tests/test_{name}.py" for name in ("bridge", "matrix", "session")]


@pytest.mark.parametrize(
    ("changed", "runs"),
    [
        ({"transformers", "torch"}, ["bridge", "matrix", "session"]),
        ({"huggingface-hub"}, ["bridge", "matrix", "session"]),
        ({"torch", "pydantic"}, ["--sample=1", "bridge", "session"]),
        (set(), ["session"]),
    ],
)
def test_what_runs_follows_from_what_differs(changed: set[str], runs: list[str]) -> None:
    told, arguments = newest_tests.choose(changed, FILES, ["matrix"], ["session"])
    assert [argument.removeprefix("tests/test_").removesuffix(".py") for argument in arguments] == runs
    assert told.startswith(("all", "only session"))


def test_a_version_that_differs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    version = newest_tests.metadata.version
    monkeypatch.setattr(newest_tests.metadata, "version", lambda name: "0.1+cpu" if name == "torch" else version(name))
    (locked,) = re.findall(r"^torch==(.*)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert newest_tests.told({"torch": newest_tests.changed_versions()["torch"]}) == f"torch {locked} -> 0.1"


def test_the_makefile_names_files_that_exist_and_depend_on_versions() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    names = ("OURS", "BREADTH", "SMOKE", "WHOLE")
    lists = {name: re.search(rf"^{name} := (.*)$", text, re.MULTILINE)[1].split() for name in names}  # type: ignore[index]
    assert [name for names in lists.values() for name in names if not (ROOT / f"tests/test_{name}.py").exists()] == []
    assert all(lists[name] == sorted(set(lists[name])) for name in lists)
    assert not set(lists["OURS"]) & {*lists["BREADTH"], *lists["SMOKE"], *lists["WHOLE"]}


def test_the_arguments_are_printed_alone() -> None:
    command = [sys.executable, "scripts/newest_tests.py", "--breadth", "matrix", "--smoke", "bridge session", *FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"--sample=1", *FILES}
    assert done.stderr.startswith("differs from requirements.lock: ")


@pytest.mark.parametrize(
    ("number", "most", "chosen"), [(5, 2, [0, 4]), (9, 3, [0, 4, 8]), (2, 2, [0, 1]), (1, 3, [0]), (7, 1, [0])]
)
def test_a_sample_is_spread_from_the_first_to_the_last(number: int, most: int, chosen: list[int]) -> None:
    assert sampling.spread(number, most) == chosen


def test_a_sample_has_a_part_of_every_test_and_the_whole_of_some_files() -> None:
    ids = ["a.py::one", *(f"{file}.py::{name}[{n}-x]" for file in ("a", "b") for name in ("two", "three") for n in range(4))]
    items: list[Any] = [
        SimpleNamespace(nodeid=f"tests/test_{text}", path=Path(f"tests/test_{text.split('::')[0]}")) for text in ids
    ]
    gone = {item.nodeid for item in sampling.left_out(items, 2, ["b"])}
    assert gone == {f"tests/test_a.py::{name}[{n}-x]" for name in ("two", "three") for n in (1, 2)}
