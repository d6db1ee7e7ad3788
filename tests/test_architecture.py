"""What the folders promise: a small core that knows no special case, and modules that use each other's public names."""

from __future__ import annotations

import ast
import graphlib
import io
import re
import sys
import tokenize
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import aptvit

ROOT = Path(aptvit.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
SPECIAL = r"two_pass|first_pass|preview|clips|export|glance|spread|embedding_scorer"


def named_in_contributing() -> list[str]:
    """The files of the core, in the order of the way of the data."""
    section = CONTRIBUTING.read_text().split("## The core")[1].split("\n## ")[0]
    return re.findall(r"^\| `((?:\w+/)+\w+\.py)`", section, re.MULTILINE)


def lines_of_code(path: Path) -> int:
    """Lines without docstrings, comments and blanks."""
    text, docstrings = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


@torch.inference_mode()
def test_the_core_is_what_contributing_says(make_host: Any, images: Tensor) -> None:
    """All files in which code runs from images to logits, kernels apart."""
    files: set[str] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if frame.f_code.co_name != "<module>" and path.is_relative_to(ROOT):
            files.add(path.relative_to(ROOT).as_posix())

    model = aptvit.adapt(make_host(dynamic_img_size=True), thresholds=(6.0, 6.0))
    mixed = [images[0], images[1][:, :64]]
    model(images)  # what is imported and compiled once is not traced
    model.train().eval()  # nothing is kept
    sys.setprofile(trace)
    try:
        model(images)
        model(mixed)
        model(images, keep=0.5)
    finally:
        sys.setprofile(None)
    core = named_in_contributing()
    per_call = {"patching/budget.py"}  # a value that a call may bring along
    assert {name for name in files if "kernels/" not in name} - per_call == set(core)
    assert len(core) <= 12
    assert sum(lines_of_code(ROOT / name) for name in core) <= 1300


def test_the_core_names_no_special_case() -> None:
    for name in named_in_contributing():
        assert re.findall(SPECIAL, (ROOT / name).read_text()) == [], name


def private_names_of_others(path: Path) -> list[str]:
    """Uses of a name with an underscore that the file does not define, of this package's or of unknown objects."""
    tree = ast.parse(path.read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            defined.add(node.id if isinstance(node, ast.Name) else node.attr)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aptvit"):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
        if not isinstance(node, ast.Attribute) or not re.match(r"_[a-z]", node.attr) or node.attr in defined:
            continue
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            found.append(ast.unparse(node))
    return found


def test_modules_use_public_names_of_each_other() -> None:
    of_libraries = {
        "module.config._attn_implementation",  # transformers has no public way to set it on a part of a model
        "torch._C",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
        "storage._cdata",
        "vit._pos_embed",
        "AcceleratorState._reset_state",
        "os._exit",
        "Tensor._make_wrapper_subclass",  # how PyTorch documents tensors that hold others
    }
    found = {name for path in ROOT.rglob("*.py") for name in private_names_of_others(path)}
    assert found <= of_libraries


def imported_files(path: Path) -> set[Path]:
    """The files of aptvit that a file imports, inside functions and for types too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    stems = [ROOT.parent.joinpath(*name.split(".")) for name in names if name.split(".")[0] == "aptvit"]
    files = {file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()}
    return files - {ROOT / "__init__.py"}  # loads by name what is asked for


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {path: imported_files(path) for path in sorted(ROOT.rglob("*.py"))}
    assert imported_files(ROOT / "encoder" / "encoder.py") >= {ROOT / "layers" / "attention.py"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files
