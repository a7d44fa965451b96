"""Writes the generated pages: docs/cli.md from the commands' own help, COMPATIBILITY.md's table from the record.

python scripts/generate_docs.py [--check]     `--check` only compares.
"""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rabbit_engine.architectures import Record, read_record
from rabbit_engine.utils.keywords import KEYWORDS

ROOT = Path(__file__).parents[1]
COMMAND = ["-m", "typer", "rabbit_engine.cli.app", "utils", "docs", "--name", "rabbit"]
ENCODING_RECORD = ROOT / "docs" / "encodings.json"
TASK_RECORD = ROOT / "docs" / "tasks.json"
CONFORMANCE = ROOT / "docs" / "conformance.json"
FAMILIES = ("<!-- the table: `make matrix` runs it, `make docs` writes it -->", "<!-- end of the table -->")
KEYWORD_TABLE = (
    "<!-- the keywords: rabbit_engine/utils/keywords.py, `make docs` writes them -->",
    "<!-- end of the keywords -->",
)
ENCODINGS = (
    "<!-- the encodings: `make encodings` runs them, `make docs` writes the table -->",
    "<!-- end of the encodings -->",
)
TASKS = ("<!-- the tasks: `make matrix` runs them, `make docs` writes the table -->", "<!-- end of the tasks -->")
MIXIN = ("<!-- conformance: `make conformance` runs it, `make docs` writes it -->", "<!-- end of conformance -->")


def cli_page() -> str:
    """The page as typer renders it."""
    done = subprocess.run(
        [sys.executable, *COMMAND], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"}
    )
    return html.unescape(done.stdout).rstrip() + "\n"


def compatibility_page() -> str:
    """COMPATIBILITY.md with its tables regenerated."""
    page = (ROOT / "COMPATIBILITY.md").read_text(encoding="utf-8")
    page = between(page, FAMILIES, families_table(read_record()))
    page = between(page, ENCODINGS, recorded_table(json.loads(ENCODING_RECORD.read_text(encoding="utf-8"))))
    page = between(page, TASKS, recorded_table(json.loads(TASK_RECORD.read_text(encoding="utf-8"))))
    return between(page, MIXIN, conformance_table(json.loads(CONFORMANCE.read_text(encoding="utf-8"))))


def migrating_page() -> str:
    """docs/migrating.md with its table of transformers' keywords regenerated."""
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    rows = [["keyword", "here", "how, or why"], *([f"`{row.name}`", row.treatment, row.reason] for row in KEYWORDS)]
    return between(page, KEYWORD_TABLE, as_table(rows))


def between(page: str, marks: tuple[str, str], text: str) -> str:
    """The page with `text` between two marks."""
    before, _, rest = page.partition(marks[0])
    return f"{before}{marks[0]}\n\n{text}\n{marks[1]}{rest.partition(marks[1])[2]}"


def as_table(lines: list[list[str]]) -> str:
    """Markdown; the first line is its head."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def families_table(record: Record) -> str:
    """The record as a table."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))
    names = ["models", "checkpoint's class", "runs as", *record.rows[0].columns, "equal to"]
    rows = [
        [row.models, row.cls, "the same" if row.runs_as == row.cls else row.runs_as, *row.columns.values(), row.oracle]
        for row in record.rows
    ]
    return f"Run on {record.date} with {versions}.\n\n" + as_table([names, *rows])


def recorded_table(record: dict[str, Any]) -> str:
    """What was run in each encoding or for each task, and what it equals."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
    rows = [list(row.values()) for row in record["rows"]]
    head = ["equal to" if name == "reference" else name.replace("_", " ") for name in record["rows"][0]]
    return f"Run on {record['date']} with {versions}.\n\n" + as_table([head, *rows])


def conformance_table(record: dict[str, Any]) -> str:
    """The outcome of each family's tests, and why tests were left out or skipped."""
    outcomes = [name for name in next(iter(record["families"].values())) if name != "seconds"]
    rows = [[family, *(str(counts[name]) for name in outcomes)] for family, counts in record["families"].items()]
    head = ["family", *(name.replace("_", " ") for name in outcomes)]
    explained = (
        "*fails whole too*: also where transformers loads the model whole; *known*: a documented refusal; *skipped*: by the test"
    )
    lines = [f"- left out, {len(tests)} tests: {reason}" for reason, tests in record["left_out"].items()]
    lines += [f"- skipped in {sum(tests.values())} runs: {reason}" for reason, tests in record["skipped"].items()]
    for kind in ("known", "fails_whole_too", "failed"):
        lines += [f"- {kind.replace('_', ' ')}: {one['family']}, `{one['test']}`: {one['reason']}" for one in record[kind]]
    when = f"Run on {record['date']} with transformers {record['versions']['transformers']}. {explained}."
    return f"{when}\n\n{as_table([head, *rows])}\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Exit code 1 where a page is stale."""
    pages = {
        ROOT / "docs" / "cli.md": cli_page(),
        ROOT / "docs" / "migrating.md": migrating_page(),
        ROOT / "COMPATIBILITY.md": compatibility_page(),
    }
    for path, page in pages.items():
        if "--check" not in sys.argv[1:]:
            path.write_text(page, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != page:
            sys.exit(f"{path.name} is stale: run `make docs`")


if __name__ == "__main__":
    main()
