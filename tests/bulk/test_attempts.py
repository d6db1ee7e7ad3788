"""A part that kills its workers is given up, wherever its folder is; a part that is written is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from aptvit.bulk.attempts import MOST, Attempts

fsspec = pytest.importorskip("fsspec")


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_six_beginnings_without_an_end(kind: str, tmp_path: Path) -> None:
    attempts = Attempts(str(tmp_path) if kind == "folder" else f"memory:/{tmp_path}")
    assert [attempts.begin(3, "write") for _ in range(MOST + 2)] == [True] * MOST + [False] * 2
    assert attempts.begin(3, "read") and attempts.begin(4, "write")
    attempts.end(3, "write")
    assert attempts.begin(3, "write")
    attempts.end(5, "write")  # it never began
    fs, root = fsspec.core.url_to_fs(attempts.out)
    names = sorted(path.rpartition("/")[2] for path in fs.ls(root, detail=False))
    assert names == [".part-000003.read-0", ".part-000003.write-0", ".part-000004.write-0"]
