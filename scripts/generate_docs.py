"""Write the pages that are generated: docs/cli.md from the commands' own help, COMPATIBILITY.md's table from the record.

python scripts/generate_docs.py [--check]     `--check` only compares.
"""

from __future__ import annotations

import html
import os
import subprocess
import sys
from pathlib import Path

from rabbit_engine.architectures import Record, read_record

ROOT = Path(__file__).parents[1]
COMMAND = ["-m", "typer", "rabbit_engine.cli.app", "utils", "docs", "--name", "rabbit"]
BEGIN, END = "<!-- the table: `make matrix` runs it, `make docs` writes it -->", "<!-- end of the table -->"


def cli_page() -> str:
    """The page as typer renders it."""
    done = subprocess.run(
        [sys.executable, *COMMAND], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"}
    )
    return html.unescape(done.stdout).rstrip() + "\n"


def compatibility_page() -> str:
    """COMPATIBILITY.md with its table written anew."""
    before, _, rest = (ROOT / "COMPATIBILITY.md").read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{families_table(read_record())}\n{END}{rest.partition(END)[2]}"


def families_table(record: Record) -> str:
    """The record as a table."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))
    names = ["models", "checkpoint's class", "runs as", *record.rows[0].columns, "equal to"]
    rows = [
        [row.models, row.cls, "the same" if row.runs_as == row.cls else row.runs_as, *row.columns.values(), row.oracle]
        for row in record.rows
    ]
    lines = [names, ["---"] * len(names), *rows]
    return f"Run on {record.date} with {versions}.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Exit code 1 where a page is stale."""
    pages = {ROOT / "docs" / "cli.md": cli_page(), ROOT / "COMPATIBILITY.md": compatibility_page()}
    for path, page in pages.items():
        if "--check" not in sys.argv[1:]:
            path.write_text(page, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != page:
            sys.exit(f"{path.name} is stale: run `make docs`")


if __name__ == "__main__":
    main()
