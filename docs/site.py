"""Hooks of the site: the README is its first page, and measurements and examples are part of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_BESIDE = ("benchmarks/results", "examples")
_PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add what lies beside the folder of the docs."""
    for page, source in _PAGES.items():
        files.append(File.generated(config, page, content=(_ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "CITATION.cff", abs_src_path=str(_ROOT / "CITATION.cff")))
    for folder in _BESIDE:
        for path in sorted((_ROOT / folder).rglob("*.*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files.append(File.generated(config, str(path.relative_to(_ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a repository to links of a site."""
    if page.file.src_uri in _PAGES:
        return re.sub(r"\]\(docs/", "](", markdown).replace("](CONTRIBUTING.md)", "](contributing.md)")
    markdown = markdown.replace("](../../CONTRIBUTING.md)", "](../contributing.md)")
    return re.sub(r"\]\(\.\./\.\./(benchmarks|examples)/", r"](../\1/", markdown)
