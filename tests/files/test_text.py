"""Text files, and names of files in messages."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from aptvit.files.text import printable, read_json, read_yaml


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("näme 猫.png", "näme 猫.png"),
        ("a\nb.png", "a\\nb.png"),
        ("\x1b[31ma", "\\x1b[31ma"),
        ("a\u202egnp", "a\\u202egnp"),
        ("a\udcff", "a\\xff"),
        ("a\x00b\x9b", "a\\x00b\\x9b"),
    ],
)
def test_names_are_printed_in_a_line(name: str, text: str) -> None:
    assert printable(name) == text == printable(text)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": ' + "9" * 10_000 + "}", "", "{", "\x00"],
    ids=["nested", "large number", "empty", "open", "null"],
)
def test_what_is_no_json_is_a_line_with_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not JSON") as refused:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(refused.value)


_LAUGHS = "a: &a [x]\n" + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    "text",
    [_LAUGHS, "a: &a\n  b: *a\n", "[" * 5000, "!!python/object/apply:os.system ['touch canary']", "a: [", "\x00"],
    ids=["laughs", "cycle", "nested", "code", "open", "null"],
)
def test_what_is_no_yaml_is_a_line_with_its_name(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml is not YAML") as refused:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(refused.value) and not (tmp_path / "canary").exists()


def test_yaml_holds_names_and_values(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("")
    assert read_yaml(path) == {}
    path.write_text("a: [1, 2]")
    assert read_yaml(path) == {"a": [1, 2]}
    path.write_text("- 1")
    with pytest.raises(ValueError, match="must hold names and values"):
        read_yaml(path)


def test_yaml_that_is_nested_too_deeply(tmp_path: Path) -> None:
    """Found while it is read: PyYAML takes minutes for the whole."""
    path = tmp_path / "a.yaml"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"a\.yaml is not YAML: values are nested more than 20 deep"):
        read_yaml(path)
