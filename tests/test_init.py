"""What `import aptvit` gives, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import aptvit

ROOT = Path(__file__).parents[1]

# Of extras, but torch, torchvision or huggingface-hub import them where they are installed.
NEEDED_BY_TIMM = ("fsspec", "yaml")


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


def test_adapting_timm_models_needs_no_extra() -> None:
    """Libraries of extras cannot be imported: adapting, calibrating, saving and drawing work without them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: [Requirement(line) for line in lines] for name, lines in project["optional-dependencies"].items()}
    base = {Requirement(line).name for line in project["dependencies"]}
    distributions = {r.name.lower() for rs in extras.values() for r in rs} - base - {"aptvit"}
    modules = [name for name, of in packages_distributions().items() if {n.lower() for n in of} & distributions]
    assert {"typer", "rich", "numba", "skimage", "transformers", "onnx", "matplotlib"} <= set(modules)
    script = f"""
import sys
sys.modules.update(dict.fromkeys({[name for name in modules if name not in NEEDED_BY_TIMM]}))
import tempfile, timm, torch, aptvit
model = aptvit.adapt(timm.create_model("vit_tiny_patch16_224", depth=1), keep=0.5)
images = torch.rand(2, 3, 224, 224)
aptvit.calibrate(model, [images], keep=0.5)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    assert aptvit.from_pretrained(folder)(images).shape == (2, 1000)
print(aptvit.show(model, images[0]).size)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "(896, 896)", done.stderr
