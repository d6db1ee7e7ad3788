"""What `import aptvit` gives, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import aptvit


def test_all_names_are_there() -> None:
    for name in aptvit.__all__:
        assert getattr(aptvit, name).__module__.startswith("aptvit."), name
        assert name in dir(aptvit)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        aptvit.nothing  # noqa: B018


def test_the_command_line_loads_torch_when_it_needs_it() -> None:
    script = (
        "import sys, aptvit.cli; print([name for name in ('torch', 'timm', 'PIL', 'gradio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
