"""Hooks of the site: the README is its first page, and measurements and examples are part of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_BESIDE = ("benchmarks/results", "examples")


def on_files(files: Files, config: Any) -> Files:
    """Add what lies beside the folder of the docs."""
    files.append(File.generated(config, "index.md", content=(_ROOT / "README.md").read_text(encoding="utf-8")))
    files.append(File.generated(config, "contributing.md", content=(_ROOT / "CONTRIBUTING.md").read_text("utf-8")))
    for folder in _BESIDE:
        for path in sorted((_ROOT / folder).rglob("*.*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files.append(File.generated(config, str(path.relative_to(_ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a repository to links of a site."""
    if page.file.src_uri == "index.md":
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?CONTRIBUTING\.md\)", "](contributing.md)", markdown)
    return re.sub(r"\]\(\.\./(benchmarks|examples)/", r"](\1/", markdown)
