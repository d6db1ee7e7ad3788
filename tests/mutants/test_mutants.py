"""Mutants of the core still apply, and the core's tests notice each."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from mutants.table import MUTANTS, Mutant

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "src" / "aptvit"


def test_there_are_enough_and_each_has_a_name() -> None:
    assert len(MUTANTS) >= 24
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


@cache
def functions(test_file: Path) -> list[str]:
    """Names of a file's tests."""
    return re.findall(r"^def (test_\w+)", test_file.read_text(), re.MULTILINE)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_applies_in_one_place_and_its_tests_exist(mutant: Mutant) -> None:
    mutated, text = mutant.mutated(PACKAGE), (PACKAGE / mutant.file).read_text()
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))  # not in a comment
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert functions(TESTS / path) if not name else name.partition("[")[0] in functions(TESTS / path)


def test_a_place_that_is_not_there_once_is_named(tmp_path: Path) -> None:
    (tmp_path / "sum.py").write_text("a + b + c\n")
    for old, number in (("-", 0), ("+", 2)):
        with pytest.raises(ValueError, match=f"sum.py holds this text {number} times"):
            Mutant("sign", "sum.py", old, "*", ()).mutated(tmp_path)
    assert Mutant("sign", "sum.py", "b + c", "b - c", ()).mutated(tmp_path) == "a + b - c\n"


@pytest.mark.slow
def test_every_mutant_is_killed() -> None:
    command = [sys.executable, str(Path(__file__).with_name("run.py"))]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(MUTANTS)} of {len(MUTANTS)} mutants killed" in result.stdout
