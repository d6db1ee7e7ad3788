"""README and docs: lengths, tables that are those of the committed results, pages that are in the navigation."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", DOCS / "make_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(page: Path) -> int:
    return len(page.read_text(encoding="utf-8").splitlines())


def test_lengths() -> None:
    assert lines(ROOT / "README.md") <= 130
    assert lines(DOCS / "results" / "dense.md") <= 120
    for page in (DOCS / "how-to").iterdir():
        assert lines(page) <= 100, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_of_the_committed_results(page: Path, tables: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == len(tables.MARKED.findall(text))
    assert tables.fill(page, text) == text, "run python docs/make_tables.py"


def test_each_table_is_on_a_page(tables: ModuleType) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(tables.TABLES)


def test_a_changed_number_is_noticed(tables: ModuleType) -> None:
    page = DOCS / "explain" / "scorers.md"
    text = page.read_text(encoding="utf-8")
    changed = text.replace("1.04 %", "1.03 %")
    assert changed != text == tables.fill(page, changed)


def test_each_page_is_in_the_navigation() -> None:
    navigation = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert sorted(navigation) == sorted(pages | {"index.md", "contributing.md"})


def test_links_lead_to_files() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not link.startswith(("http:", "https:")):
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_no_number_by_hand() -> None:
    for page in PAGES:
        assert "by hand" not in page.read_text(encoding="utf-8"), page.name
