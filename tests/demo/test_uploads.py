"""The folder of uploads: private, and gone after every end of its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aptvit.demo.uploads import delete_old_files, size_of_files, upload_folder

PROCESS = """
from aptvit.cli.demo import _stop_signals
from aptvit.demo.uploads import upload_folder
with _stop_signals() as received, upload_folder() as folder:
    (folder / "image.png").write_text("x")
    print(folder, flush=True)
    received.wait()
"""


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def start() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process, folder = start()
    assert (folder / "image.png").exists()
    process.send_signal(number)
    process.send_signal(signal.SIGINT)  # an impatient second one
    assert process.wait(30) == 0
    assert not list(tmp_path.iterdir())


def test_the_next_start_deletes_what_killed_processes_left(tmp_path: Path) -> None:
    killed, left = start()
    killed.kill()
    killed.wait()
    running, kept = start()
    assert (kept / "image.png").exists() and not left.parent.exists()
    with upload_folder() as folder:
        assert folder.parent.parent == tmp_path and folder.parent.stat().st_mode & 0o077 == 0
        assert (kept / "image.png").exists()
    running.terminate()
    running.wait(30)
    assert not list(tmp_path.iterdir())


def test_foreign_folders_of_that_name_stay(tmp_path: Path) -> None:
    (tmp_path / "aptvit-demo-mine").mkdir()
    (tmp_path / "aptvit-demo-mine" / "notes.txt").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").write_text("")
    (tmp_path / "aptvit-demo-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "aptvit-demo-file").write_text("x")
    with upload_folder():
        pass
    assert (tmp_path / "aptvit-demo-mine" / "notes.txt").exists() and (tmp_path / "elsewhere" / "lock").exists()


def test_old_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(bytes(1000))
    os.utime(tmp_path / "a" / "x.png", (0, 0))  # the time of the upload counts, not that of the photo
    (tmp_path / "a" / "broken").symlink_to(tmp_path / "none")
    delete_old_files(tmp_path, 60)
    assert 1000 <= size_of_files(tmp_path) < 2000
    delete_old_files(tmp_path, -1)
    assert size_of_files(tmp_path) == 0 and not list((tmp_path / "a").iterdir())
