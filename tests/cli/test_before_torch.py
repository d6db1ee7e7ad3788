"""Wrong paths, wrong values and missing extras print one line with exit code 2, before torch is imported."""

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
def work_folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def refused(work_folder: Path, *words: str) -> str:
    """Return the line that a refused command prints in a process that cannot import torch."""
    done = subprocess.run([sys.executable, "-c", RUN, *words], cwd=work_folder, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and done.stdout == "", (words, done.stdout, done.stderr)
    assert lines[0].startswith("aptvit: ")
    return lines[0]


PATHS = {
    "show nowhere": "nowhere does not exist",
    "show empty": "no images found in empty",
    **{
        f"{command} text.jpg": "none of 1 files can be read; the first: text.jpg: not an image"
        for command in ("show", "compare", "calibrate", "tune", "benchmark", "export", "heal", "detect --run model")
    },
    "segment nowhere.jpg --run model": "nowhere.jpg does not exist",
    "segment images --run model --max-side 900 --tile 500": "--max-side and --tile: give one",
    "evaluate images --calibrate-on text.jpg": "text.jpg: not an image",
    "compare nowhere --json": "nowhere does not exist",
    "compare images --checkpoint none.pt": "--checkpoint none.pt does not exist",
    "compare images --config none.json": "--config none.json does not exist",
    "compare images --labels images": "--labels images is a folder",
    "compare nowhere.mp4 --video": "nowhere.mp4 does not exist",
    "compare images --out images/a.png/out": "cannot write to images/a.png/out",
    "calibrate nowhere": "nowhere does not exist",
    "tune images --time 0.5 --gflops 3": "--time and --gflops: give only one target",
    "evaluate nowhere": "nowhere does not exist",
    "evaluate images --calibrate-on nowhere": "nowhere does not exist",
    "evaluate images --task detection --run nowhere": "--run nowhere does not exist",
    "benchmark nowhere": "nowhere does not exist",
    "embed nowhere": "nowhere does not exist",
    "export nowhere": "nowhere does not exist",
    "vqa nowhere.jpg what? --llava x": "nowhere.jpg does not exist",
    "demo --checkpoint none.pt": "--checkpoint none.pt does not exist",
    "heal nowhere": "nowhere does not exist",
    "finetune nowhere": "nowhere does not exist",
    "finetune images --recipe none.yaml": "there is no recipe 'none.yaml'",
    "train-detector nowhere": "nowhere does not exist",
    "train-detector images --start nowhere": "--start nowhere does not exist",
    "train-segmenter nowhere": "nowhere does not exist",
    "detect nowhere --run images": "--run images holds no model",
    "detect images": "--run is missing",
    "segment images --run nowhere": "--run nowhere does not exist",
}

VALUES = {
    "show images --thresholds five": "give numbers, from fine to coarse",
    "show images --thresholds 5 --keep 0.5": "--thresholds and --keep: give one",
    "show images --thresholds 5 4 --scales 2": "one threshold for each size",
    "demo --host 0.0.0.0": "give a password by --password or APTVIT_DEMO_PASSWORD, or --no-password",
    "demo --password short": "the password has 5 letters",
    "show images --why 3": "give the column and the row of a pixel",
    "compare images --keep 0.5 --config images/a.png": "--keep and --config: give one",
    "benchmark images --keeps many": "give numbers, separated by commas",
    "finetune images --set cascade=true": "no setting 'cascade', which is a setting of detection",
    "train-detector images --set temperature=2": "a detection recipe has no setting 'temperature'",
    "export images --format torch-export --int8": "are options of ONNX",
}

EXTRAS = {
    "without:typer show photos": "pip install 'aptvit[cli]'",
    "without:gradio demo": "pip install 'aptvit[demo]'",
    "without:skimage benchmark": "pip install 'aptvit[demo]'",
    "without:onnx export images": "pip install 'aptvit[export]'",
    "without:pyarrow embed images": "pip install 'aptvit[bulk]'",
    "without:ray embed images --actors 1": "pip install 'aptvit[ray]'",
    "without:transformers vqa images/a.png what? --llava x": "pip install 'aptvit[hf]'",
    "without:yaml heal images": "pip install 'aptvit[train]'",
    "without:accelerate finetune images": "pip install 'aptvit[train]'",
    "without:datasets finetune hf:beans": "pip install 'aptvit[data]'",
    "without:faster_coco_eval train-detector images": "pip install 'aptvit[dense]'",
    "without:accelerate train-detector images": "pip install 'aptvit[dense]'",
    "without:transformers train-segmenter images": "pip install 'aptvit[dense]'",
}


@pytest.mark.parametrize("words", PATHS)
def test_wrong_paths(words: str, work_folder: Path) -> None:
    assert PATHS[words] in refused(work_folder, *words.split())


@pytest.mark.parametrize("words", VALUES)
def test_wrong_values(words: str, work_folder: Path) -> None:
    assert VALUES[words] in refused(work_folder, *words.split())


@pytest.mark.parametrize("words", EXTRAS)
def test_missing_extras(words: str, work_folder: Path) -> None:
    assert EXTRAS[words] in refused(work_folder, *words.split())


def test_valid_commands_import_torch(work_folder: Path) -> None:
    """The other tests assume it."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, "show", "images"], cwd=work_folder, capture_output=True, text=True
    )
    assert "torch is imported" in done.stderr


def test_print_config_and_the_reference_need_no_torch(work_folder: Path) -> None:
    for words in (["finetune", "images", "--print-config"], ["reference"], ["--help"], ["show", "--help"]):
        done = subprocess.run([sys.executable, "-c", RUN, *words], cwd=work_folder, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout and not done.stderr, (words, done.stderr)
