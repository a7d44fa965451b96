"""Decide which tests `make test-newest` runs, from what differs between its environment and requirements.lock.

    .venv-newest/bin/python scripts/newest_tests.py --breadth matrix --smoke session tests/test_*.py

Prints arguments of pytest on stdout, and what it decided and why on stderr. `make test` has already run every test on the locked
versions:

- transformers, or a package that reads checkpoints for it, differs: all files;
- only others, such as torch, differ: all but `--breadth`, which run one mechanism over every model or task, and of each test
  the first parametrisation;
- none differs: only `--smoke`, for the sake of the newer Python.
"""

import argparse
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TOOLS = {"dev", "docs", "browser", "flash", "cluster"}
"""Extras that no test of other versions imports."""

OF_MODELS = {"accelerate", "gguf", "huggingface-hub", "safetensors", "sentencepiece", "tokenizers", "transformers"}


def changed_versions() -> dict[str, str]:
    """`{"torch": "2.13.0 -> 2.15.0"}`: of the packages that pyproject.toml names, and tokenizers, which transformers brings."""
    lines = [line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line]
    locked: dict[str, str] = {canonicalize_name(name): version for name, version in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [texts for extra, texts in project["optional-dependencies"].items() if extra not in TOOLS]
    named = {canonicalize_name(Requirement(text).name) for texts in [project["dependencies"], *extras] for text in texts}
    here = {name: metadata.version(name).partition("+")[0] for name in sorted({"tokenizers", *named} & set(locked))}
    return {name: f"{locked[name]} -> {version}" for name, version in here.items() if version != locked[name]}


def choose(
    changed: Collection[str], files: Sequence[str], breadth: Collection[str], smoke: Collection[str]
) -> tuple[str, list[str]]:
    """What was decided, and the arguments of pytest."""
    if set(changed) & OF_MODELS:
        return "all tests that depend on versions", list(files)
    if changed:
        told = f"all tests that depend on versions but {', '.join(breadth)}, each with its first parametrisation"
        return told, ["--sample=1", *(f for f in files if _name(f) not in breadth)]
    return f"only {', '.join(smoke)}", [f for f in files if _name(f) in smoke]


def _name(file: str) -> str:
    return Path(file).stem.removeprefix("test_")


def told(changed: Mapping[str, str]) -> str:
    """What differs, as text."""
    return ", ".join(f"{name} {versions}" for name, versions in changed.items()) or "nothing"


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--breadth", required=True, help="names of test files, separated by spaces")
    parser.add_argument("--smoke", required=True, help="the same")
    given = parser.parse_args()
    changed = changed_versions()
    decided, arguments = choose(changed, given.files, given.breadth.split(), given.smoke.split())
    print(f"differs from requirements.lock: {told(changed)}; runs {decided}", file=sys.stderr)
    print(*arguments)


if __name__ == "__main__":
    main()
