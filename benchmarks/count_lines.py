"""Lines of code of files and folders: docstrings, comments and blank lines are not counted.

What measuring took before it was gathered in `measuring/` (BEFORE is a checkout of e34fdd6), and what it takes in THIS:

    cd BEFORE/src/aptvit && python THIS/benchmarks/count_lines.py measure.py benchmark*.py compare.py report.py \\
        evaluation dense/evaluation.py training/result.py records.py export_check.py
    cd THIS/src/aptvit && python THIS/benchmarks/count_lines.py measuring benchmark compare report/page.py evaluation \\
        export/check.py

Since then what `compare.py` and `evaluation/` read images with is in `files/batches.py` and `datasets/labelled.py`,
which only the first command counts. Needs Python alone.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Lines of Python code in a text."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def python_files(paths: Iterable[Path]) -> list[Path]:
    """The files, and those in the folders."""
    return [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a file, or a folder of files")
    files = python_files(parser.parse_args().paths)
    counts = [code_lines(file.read_text(encoding="utf-8")) for file in files]
    for file, count in zip(files, counts, strict=True):
        print(f"{count:6,} {file}")
    print(f"{sum(counts):6,} in all")


if __name__ == "__main__":
    main()
