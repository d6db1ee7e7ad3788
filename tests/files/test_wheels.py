"""Files of wheels, from an index that is a folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from aptvit.files.wheels import file_of_wheel


def test_a_wheel_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"^pip cannot fetch nothing-like-it==1\.0: .*$"):
        file_of_wheel("nothing-like-it==1.0", "a.bin", "0" * 64, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_wheel_is_kept_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Asked of another process: importing pip swaps distutils in this one, on which inductor builds later tests.
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        pytest.skip("environments of uv have no pip")
    wheel = tmp_path / "index" / "some_data-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_data/a.bin", b"weights")
        archive.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr("some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    right = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(ValueError, match="has the digest"):
        file_of_wheel("some-data==1.0", "some_data/a.bin", "0" * 64, tmp_path / "kept")
    with pytest.raises(ValueError, match=r"holds no b\.bin"):
        file_of_wheel("some-data==1.0", "b.bin", right, tmp_path / "kept")
    kept = file_of_wheel("some-data==1.0", "some_data/a.bin", right, tmp_path / "kept")
    assert kept.read_bytes() == b"weights"
    wheel.unlink()
    assert file_of_wheel("some-data==1.0", "some_data/a.bin", right, tmp_path / "kept") == kept
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [kept.name]
