"""Wrong paths, wrong values and missing extras are one line and exit code 2, before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

RUN = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm"):
            raise RuntimeError(f"{name} is imported")

sys.meta_path.insert(0, Missing())
missing = [word.removeprefix("without:") for word in sys.argv[1:] if word.startswith("without:")]
for name in missing:
    sys.modules[name] = None
sys.argv = ["aptvit", *(word for word in sys.argv[1:] if not word.startswith("without:"))]

from aptvit.__main__ import main

main()
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "empty").mkdir()
    return tmp_path


def refused(here: Path, *words: str) -> str:
    """The one line that a command prints where torch cannot be imported."""
    done = subprocess.run([sys.executable, "-c", RUN, *words], cwd=here, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and done.stdout == "", (words, done.stdout, done.stderr)
    assert lines[0].startswith("aptvit: ")
    return lines[0]


PATHS = {
    "show nowhere": "nowhere does not exist",
    "show empty": "no images found in empty",
    "compare nowhere --json": "nowhere does not exist",
    "compare photos --checkpoint none.pt": "--checkpoint none.pt does not exist",
    "compare photos --config none.json": "--config none.json does not exist",
    "compare photos --labels photos": "--labels photos is a folder",
    "compare nowhere.mp4 --video": "nowhere.mp4 does not exist",
    "compare photos --out photos/a.png/out": "cannot write to photos/a.png/out",
    "calibrate nowhere": "nowhere does not exist",
    "evaluate nowhere": "nowhere does not exist",
    "evaluate photos --calibrate-on nowhere": "nowhere does not exist",
    "evaluate photos --task detection --run nowhere": "--run nowhere does not exist",
    "benchmark nowhere": "nowhere does not exist",
    "embed nowhere": "nowhere does not exist",
    "export nowhere": "nowhere does not exist",
    "vqa nowhere.jpg what? --llava x": "nowhere.jpg does not exist",
    "demo --checkpoint none.pt": "--checkpoint none.pt does not exist",
    "heal nowhere": "nowhere does not exist",
    "finetune nowhere": "there is no folder nowhere",
    "finetune photos --recipe none.yaml": "there is no recipe 'none.yaml'",
    "train-detector nowhere": "there is no folder nowhere",
    "train-detector photos --start nowhere": "--start nowhere does not exist",
    "train-segmenter nowhere": "there is no folder nowhere",
    "detect nowhere --run photos": "--run photos holds no model",
    "detect photos": "--run is missing",
    "segment photos --run nowhere": "--run nowhere does not exist",
}

VALUES = {
    "show photos --thresholds five": "give numbers, from fine to coarse",
    "show photos --thresholds 5 --keep 0.5": "--thresholds and --keep: give one",
    "show photos --thresholds 5 4 --scales 2": "one threshold for each size",
    "show photos --why 3": "give the column and the row of a pixel",
    "compare photos --keep 0.5 --config photos/a.png": "--keep and --config: give one",
    "benchmark photos --keeps many": "give numbers, separated by commas",
    "finetune photos --set cascade=true": "no setting 'cascade', which is of detection",
    "train-detector photos --set temperature=2": "a detection recipe has no setting 'temperature'",
    "export photos --format torch-export --int8": "are of ONNX",
}

EXTRAS = {
    "without:typer show photos": "pip install 'aptvit[cli]'",
    "without:gradio demo": "pip install 'aptvit[demo]'",
    "without:skimage benchmark": "pip install 'aptvit[demo]'",
    "without:onnx export photos": "pip install 'aptvit[export]'",
    "without:pyarrow embed photos": "pip install 'aptvit[bulk]'",
    "without:ray embed photos --actors 1": "pip install 'aptvit[ray]'",
    "without:transformers vqa photos/a.png what? --llava x": "pip install 'aptvit[hf]'",
    "without:yaml heal photos": "pip install 'aptvit[train]'",
    "without:accelerate finetune photos": "pip install 'aptvit[train]'",
    "without:datasets finetune hf:beans": "pip install 'aptvit[data]'",
    "without:faster_coco_eval train-detector photos": "pip install 'aptvit[dense]'",
    "without:transformers train-segmenter photos": "pip install 'aptvit[hf]'",
}


@pytest.mark.parametrize("words", PATHS)
def test_wrong_paths(words: str, here: Path) -> None:
    assert PATHS[words] in refused(here, *words.split())


@pytest.mark.parametrize("words", VALUES)
def test_wrong_values(words: str, here: Path) -> None:
    assert VALUES[words] in refused(here, *words.split())


@pytest.mark.parametrize("words", EXTRAS)
def test_missing_extras(words: str, here: Path) -> None:
    assert EXTRAS[words] in refused(here, *words.split())


def test_without_a_mistake_torch_is_imported(here: Path) -> None:
    """What the other tests rest on."""
    done = subprocess.run([sys.executable, "-c", RUN, "show", "photos"], cwd=here, capture_output=True, text=True)
    assert "torch is imported" in done.stderr


def test_print_config_and_the_reference_need_no_torch(here: Path) -> None:
    for words in (["finetune", "photos", "--print-config"], ["reference"], ["--help"], ["show", "--help"]):
        done = subprocess.run([sys.executable, "-c", RUN, *words], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout and not done.stderr, (words, done.stderr)
