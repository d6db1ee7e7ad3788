"""The example notebook runs from top to bottom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "adaptive_patches.ipynb"


SCRIPT = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def test_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    # In a process of its own: a browser that another test drives has an event loop here.
    words = [sys.executable, "-c", SCRIPT, str(NOTEBOOK), str(tmp_path / "done.ipynb")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    notebook = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    shown = [data for cell in notebook.cells for out in cell.get("outputs", []) for data in out.get("data", {})]
    assert shown.count("image/png") == 2
    said = "".join(out["text"] for cell in notebook.cells for out in cell.get("outputs", []) if "text" in out)
    assert "largest difference with nothing merged" in said and "% of all tokens" in said
