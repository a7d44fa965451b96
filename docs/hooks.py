"""The pages of the site that lie at the root of the repository, and links between both places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT_PAGES = {"COMPATIBILITY.md": "compatibility.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Where the site has what the repository shows first. The site's own index is docs/index.md."""


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages from the root: they are in one place, and never copied by hand."""
    root = Path(config["config_file_path"]).parent
    for name, page in ROOT_PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(root / name).read_text(encoding="utf-8").replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of docs/ that lead to the root lead to the site's page instead."""
    for name, page in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown
