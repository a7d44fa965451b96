"""Write the pages that are generated: docs/cli.md from the commands' own help. `--check` only compares.

python scripts/generate_docs.py [--check]
"""

from __future__ import annotations

import html
import os
import subprocess
import sys
from pathlib import Path

CLI = Path(__file__).parents[1] / "docs" / "cli.md"
COMMAND = ["-m", "typer", "rabbit_engine.cli.app", "utils", "docs", "--name", "rabbit"]


def cli_page() -> str:
    """The page as typer renders it."""
    done = subprocess.run(
        [sys.executable, *COMMAND], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"}
    )
    return html.unescape(done.stdout).rstrip() + "\n"


def main() -> None:
    """Exit code 1 where a page is stale."""
    page = cli_page()
    if "--check" not in sys.argv[1:]:
        CLI.write_text(page, encoding="utf-8")
    elif not CLI.is_file() or CLI.read_text(encoding="utf-8") != page:
        sys.exit(f"{CLI.name} is stale: run `make docs`")


if __name__ == "__main__":
    main()
