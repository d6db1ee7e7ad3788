"""Every snippet in README and docs: Python runs from top to bottom of its page, and what must hold after each statement
holds; commands exist, with their options."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shapes
import snippets.around_checks
import snippets.choose_checks
import snippets.dense_checks
import snippets.files_checks
import snippets.hugging_face_checks
import snippets.timm_checks
import snippets.training_checks
import timm
import typer
from PIL import Image
from snippets.checks import CHECKS, is_only_a_beginning
from snippets.pages import (
    MODEL,
    PAGES,
    ROOT,
    SMALLER,
    pages_with,
    prepare,
    snippets,
    taken_for_granted,
)
from typer.testing import CliRunner

import aptvit
from aptvit.cli import app
from aptvit.files.sample_photos import sample_photos


def statements(text: str) -> Iterator[tuple[str, Any]]:
    """Each statement of a snippet, as the page has it and as a test can afford it."""
    affordable = text
    for large, little in SMALLER.items():
        affordable = affordable.replace(large, little)
    for statement, smaller in zip(ast.parse(text).body, ast.parse(affordable).body, strict=True):
        yield ast.unparse(statement), smaller


def run(statement: Any, page: str, names: dict[str, Any]) -> Any:
    """Run a statement. Returns what it gives, where it is an expression."""
    if isinstance(statement, ast.Expr):
        return eval(compile(ast.Expression(statement.value), page, "eval"), names)
    exec(compile(ast.Module([statement], []), page, "exec"), names)
    return None


@pytest.mark.parametrize("page", pages_with("python"))
def test_python(page: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(page.relative_to(ROOT))
    written = prepare(name)
    names = taken_for_granted(name)
    for language, text in snippets(page):
        for statement, affordable in statements(text) if language == "python" else ():
            value = run(affordable, name, names)
            if not is_only_a_beginning(statement):
                assert statement in CHECKS, f"{name}: what must hold after `{statement}`? Say it with @after"
                CHECKS[statement](SimpleNamespace(**names, written=written, value=value))


def test_each_check_is_on_a_page() -> None:
    python = [text for page in PAGES for language, text in snippets(page) if language == "python"]
    assert set(CHECKS) <= {statement for text in python for statement, _ in statements(text)}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each line, without what starts several of them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.mark.parametrize("page", pages_with("bash", ""))
def test_commands(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    checked = 0
    for language, text in snippets(page):
        for words in commands(text) if language in ("bash", "") else ():
            if "aptvit" in words[:5] and words[0] != "pip":
                words = words[words.index("aptvit") + 1 :]
                command = root.get_command(None, words[0])
                assert command is not None, f"{page.name}: there is no `aptvit {words[0]}`"
                # Raises where an option does not exist or a value is none of its choices; nothing is run.
                command.make_context(words[0], list(words[1:]))
            elif words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
            elif words[0].startswith("benchmarks/") or (words[:2] == ["python", words[1]] and words[1].endswith(".py")):
                assert (ROOT / words[words[0] == "python"]).is_file(), words
            else:
                assert words[0] in ("pip", "python", "git", "source", ".venv/bin/python", "cd"), words
            checked += 1
    assert checked


# Commands of training, timing and teaching, as far as a test can go.
_SHORT = {"workers": 0, "precision": "float32", "batch_size": 2, "epochs": 1, "eval_every": 0}
_DENSE = {**_SHORT, "size": 128, "channels": 16}
SET = {
    "heal": {**_SHORT, "epochs": 1000},
    "finetune": {**_SHORT, "lr": 1e-3},
    "train-detector": _DENSE,
    "train-segmenter": _DENSE,
}
LESS = {
    "heal": ["--minutes", "0.05"],
    "benchmark": ["--models", MODEL, "--batch-sizes", "1", "--rounds", "1", "--fresh"],
}
LESS |= {"compare": ["--rounds", "1"], "evaluate": ["--rounds", "1"], "tune": ["--rounds", "1", "--batch-size", "2"]}
# They serve for ever, need many processes, or read what is elsewhere: tried in tests of their own.
ELSEWHERE = ("demo", "vqa")


def make_files() -> None:
    """The folders and files that the pages name."""
    images = [Image.fromarray(photo).resize((200, 170)) for photo in sample_photos().values()]
    for folder in ("holiday", "photos", "flowers/train/a", "flowers/train/b", "flowers/val/a", "flowers/val/b", "val"):
        Path(folder).mkdir(parents=True)
        for i, image in enumerate(images):
            image.save(Path(folder) / f"{i}.png")
    for i, image in enumerate(images):
        image.rotate(180).save(f"holiday/turned{i}.png")
    for folder in ("val", "photos"):
        rows = "".join(f"{i}.png,{i}\n" for i in range(len(images)))
        Path(folder, "labels.csv").write_text(f"file,class_index\n{rows}")
    for name in ("cat.jpg", "photo.jpg"):
        images[2].save(name)
    images[0].save("street.mp4", "WEBP", save_all=True, append_images=images[1:4])
    shapes.boxes(Path("cells"), 4, 2)
    for folder in ("streets", "other"):
        shapes.masks(Path(folder), 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("bash", ""))
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda _, pretrained=False, **options: create(MODEL, **options))
    monkeypatch.setattr("aptvit.hosts.pretrained._weights_at_hand", lambda *_: True)
    monkeypatch.chdir(tmp_path)
    make_files()
    aptvit.adapt(timm.create_model("vit_base_patch16_384"), thresholds=(5.0,)).save_pretrained("run/model")
    for language, text in snippets(page):
        for words in commands(text) if language in ("bash", "") else ():
            remote = any(word.startswith("s3://") for word in words)
            if words[0] != "aptvit" or words[1] in ELSEWHERE or remote:
                continue
            name, *rest = words[1:]
            # Recipes without epochs; it is the default of a segmenter that starts from a uniform one.
            chooses = (name == "train-segmenter" and "--start" in rest) or any(
                word.endswith("-choose") for word in rest
            )
            settings = {key: value for key, value in SET.get(name, {}).items() if not chooses or key != "epochs"}
            rest += LESS.get(name, [])
            rest += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
            result = CliRunner().invoke(app, [name, *rest], catch_exceptions=False)
            assert result.exit_code == 0, (words, result.output)
