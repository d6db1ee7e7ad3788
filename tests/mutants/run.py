"""Run tests on mutants of the core: python tests/mutants/run.py [NAME ...]

Each mutant of `table.py` is a copy of the package with one mistake in it. Its tests must fail on the copy, and pass on
one without a mistake, which is checked first. The process forks once for each copy, after the import of the libraries
that take longest, so that a mutant costs little more than its tests.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "aptvit"
LIBRARIES = ("hypothesis", "numba", "pytest", "skimage.data", "sklearn.datasets", "timm", "torch._dynamo")
SECONDS = 300  # until tests of a mutant that never end are stopped
FAILED, ELSEWHERE = 1, 99  # exit codes: of pytest where tests failed; of a process that imported another package


def _run_here(package: Path, tests: Sequence[str], log: Path) -> None:
    """Run tests on a copy of the package, in a process of its own, and exit as pytest does."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(package.parent)  # for processes that a test starts
    sys.path.insert(0, str(package.parent))  # before the installed package
    import aptvit

    if package not in Path(aptvit.__file__).resolve().parents:
        sys.exit(ELSEWHERE)
    import pytest
    from hypothesis import Phase, settings

    # Examples are the same each time, failing ones are neither made smaller nor kept.
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
    settings.load_profile("mutants")
    quiet = ["-q", "--no-header", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    options = [*quiet, "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    sys.exit(int(pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)])))


def exit_code(package: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """What pytest exits with on a copy of the package, None where it does not end, and the end of what it prints."""
    log = package.parent / "log.txt"
    child = multiprocessing.get_context("fork").Process(target=_run_here, args=(package, tests, log))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return None, ""
    return child.exitcode, "\n".join(log.read_text().splitlines()[-15:])


def verdict(mutant: Mutant, unchanged: Path) -> tuple[str, str]:
    """Whether the mutant's tests notice it, in words, and the line or lines of pytest that say so.

    Args:
        mutant: The mutant.
        unchanged: A copy of the package.
    """
    with tempfile.TemporaryDirectory(dir=unchanged.parents[1]) as folder:
        # Compiled files are copied too: they are valid where the source is unchanged.
        package = Path(shutil.copytree(unchanged, Path(folder) / unchanged.name))
        try:
            (package / mutant.file).write_text(mutant.mutated(package))
        except ValueError as error:
            return "does not apply", str(error)
        code, printed = exit_code(package, mutant.tests)
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    if code == FAILED and failed:
        return "killed", failed[0]
    if code == 0:
        return "survived", ""
    return ("does not end" if code is None else f"tests do not run, exit code {code}"), printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run; all by default")
    names = parser.parse_args().names
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutants of these names: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    os.environ["OMP_NUM_THREADS"] = "1"  # and so no threads, which a fork would lose
    for library in LIBRARIES:
        importlib.import_module(library)
    assert "aptvit" not in sys.modules
    with tempfile.TemporaryDirectory(prefix="aptvit-mutants-") as folder:
        unchanged = Path(folder).resolve() / "unchanged" / PACKAGE.name
        # Files end with .pyc.NUMBER while another process writes them.
        shutil.copytree(PACKAGE, unchanged, ignore=shutil.ignore_patterns("*.pyc.*"))
        start = time.perf_counter()
        code, printed = exit_code(unchanged, sorted({test for mutant in chosen for test in mutant.tests}))
        if code != 0:
            print(f"{printed}\nwithout a mistake the tests exit with {code}: nothing is known about mutants")
            return 1
        print(f"{time.perf_counter() - start:5.1f} s  tests pass on the unchanged package", flush=True)
        killed = 0
        for mutant in chosen:
            start = time.perf_counter()
            answer, printed = verdict(mutant, unchanged)
            killed += answer == "killed"
            detail = printed if answer == "killed" else f"\n{printed}"
            print(f"{time.perf_counter() - start:5.1f} s  {answer:8}  {mutant.name}  {detail}".rstrip(), flush=True)
    print(f"{killed} of {len(chosen)} mutants killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
