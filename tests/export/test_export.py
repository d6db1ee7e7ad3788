"""Exported graphs compared with their model, on images that keep different numbers of tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from torch import Tensor
from typer.testing import CliRunner

import aptvit
from aptvit.cli import app
from aptvit.export.graphs import WholePath, export_onnx, export_torch
from aptvit.patching.entropy import EntropyScorer
from aptvit.patching.kernels.entropy_torch import entropy_maps_scattered
from aptvit.storage.writing import WriteError

onnxruntime = pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_only.py"


@pytest.fixture(scope="module")
def images() -> Tensor:
    """(3, 3, 128, 128) uint8, smooth and detailed."""
    whole = torch.from_numpy(data.astronaut()).permute(2, 0, 1)
    return torch.stack([whole[:, y : y + 128, x : x + 128] for y, x in ((0, 0), (150, 150), (300, 380))])


@torch.inference_mode()
@pytest.mark.parametrize(
    "name, options, scorer",
    [
        ("vit_tiny_patch16_224", {}, "entropy"),
        ("vit_tiny_patch16_224", {}, "laplacian"),
        ("vit_base_patch16_siglip_224", {"embed_dim": 64, "num_heads": 2}, "upsample"),
        ("eva02_tiny_patch14_224", {"patch_size": 16}, "entropy"),
        ("vit_medium_patch16_reg4_gap_256", {"embed_dim": 64, "num_heads": 2}, "entropy"),
    ],
)
def test_the_graph_equals_the_model(
    make_host: Callable[..., Any], images: Tensor, name: str, options: dict[str, Any], scorer: str
) -> None:
    host = make_host(name, img_size=128, depth=2, **options)
    model = aptvit.adapt(host, scales=3, scorer=scorer, init="nonzero").eval()
    aptvit.calibrate(model, images, keep=0.6)
    path = WholePath(model, (128, 128)).eval()
    lengths = set()
    for image in images:
        logits, scales = path(image[None])
        layout = model.layout(image[None])
        lengths.add(layout.num_tokens)
        assert torch.equal(scales, layout.scale_map[0])
        torch.testing.assert_close(logits, model(image[None]), rtol=1e-4, atol=1e-4)
    assert len(lengths) > 1


@torch.inference_mode()
def test_incomplete_coarse_patches(make_host: Callable[..., Any], images: Tensor) -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=112, depth=2), thresholds=(9.0, 9.0)).eval()
    image = images[:1, :, :112, :112].contiguous()
    logits, scales = WholePath(model, (112, 112)).eval()(image)
    assert set(scales.unique().tolist()) == {0, 1, 2}
    torch.testing.assert_close(logits, model(image), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=10)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(vit.state_dict(), path)
    return aptvit.adapt(vit, thresholds=(5.5, 4.5), init="nonzero").eval(), path


@pytest.mark.parametrize("in_parts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx(small: tuple[Any, Path], tmp_path: Path, in_parts: bool) -> None:
    model, _ = small
    written = export_onnx(model, (160, 160), tmp_path, in_parts)
    assert written.files == (("choose.onnx", "read.onnx") if in_parts else ("model.onnx",))
    sessions = [onnxruntime.InferenceSession(tmp_path / name) for name in written.files]
    lengths = set()
    for offset in (0, 100, 200, 300):
        pixels = np.ascontiguousarray(data.astronaut()[offset : offset + 160, offset : offset + 160])
        image = pixels.transpose(2, 0, 1)[None].copy()
        if in_parts:
            (scales,) = sessions[0].run(None, {"image": image})
            (logits,) = sessions[1].run(None, {"image": image, "scales": scales})
        else:
            logits, scales = sessions[0].run(None, {"image": image})
        with torch.inference_mode():
            expected, layout = model(torch.from_numpy(image)), model.layout(torch.from_numpy(image))
        lengths.add(layout.num_tokens)
        np.testing.assert_array_equal(scales, layout.scale_map[0])
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert len(lengths) > 2
    assert json.loads((tmp_path / "export.json").read_text())["thresholds"] == [5.5, 4.5]


def test_torch_export(small: tuple[Any, Path], tmp_path: Path, images: Tensor) -> None:
    model, _ = small
    export_torch(model, (128, 128), tmp_path)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for image in images:
        with torch.inference_mode():
            torch.testing.assert_close(program(image[None])[0], model(image[None]), rtol=1e-4, atol=1e-5)


def test_the_command_and_the_example(small: tuple[Any, Path], tmp_path: Path) -> None:
    _, checkpoint = small
    words = ["export", "--model", "test_vit", "--checkpoint", str(checkpoint), "--keep", "0.6", "--int8"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path), "--json"], catch_exceptions=False)
    exact, quantised = json.loads(result.stdout)
    assert exact["files"] == "model.onnx" and exact["largest_error"] < 1e-4
    assert exact["agreement"] == exact["same_patches"] == 1.0 and exact["tokens"] == pytest.approx(0.6, abs=0.02)
    assert quantised["files"] == "model.int8.onnx" and quantised["megabytes"] < exact["megabytes"] / 2
    assert 0 < quantised["largest_error"] < 0.5
    file = tmp_path / "photo.jpg"
    Image.fromarray(data.chelsea()).save(file)
    run = subprocess.run([sys.executable, EXAMPLE, tmp_path, file], check=True, capture_output=True, text=True)
    first, *classes = run.stdout.splitlines()
    assert "of 100 patch tokens" in first and len(classes) == 5
    source = EXAMPLE.read_text()
    assert "import torch" not in source and "import aptvit" not in source


def test_errors_of_models_without_a_graph(small: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = small
    vit = model.adapter.vit
    with pytest.raises(ValueError, match="by thresholds alone"):
        WholePath(aptvit.adapt(vit, keep=0.5), (160, 160))
    with pytest.raises(ValueError, match="'embedding' has no graph"):
        WholePath(aptvit.adapt(vit, thresholds=1.0, scorer="embedding"), (160, 160))
    with pytest.raises(ValueError, match="not whole patches of 16"):
        WholePath(model, (160, 150))
    with pytest.raises(ValueError, match="windows have no graph"):
        WholePath(aptvit.adapt(vit, thresholds=1.0, window_size=2), (160, 160))
    with pytest.raises(ValueError, match="are options of ONNX"):
        words = ["export", "--format", "torch-export", "--int8", "--out", str(tmp_path)]
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_a_tower_of_transformers_has_no_graph(images: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=128
    )
    model = aptvit.adapt(transformers.ViTModel(config), thresholds=(5.5,))
    with pytest.raises(ValueError, match="ViTModel has no graph yet"):
        WholePath(model, (128, 128))


def test_an_export_changes_nothing_else(make_host: Callable[..., Any], images: Tensor, tmp_path: Path) -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=112, depth=1), thresholds=(5.0,)).eval()
    # No other test scores images of this size, so the tables for it are made during the export.
    export_onnx(model, (112, 112), tmp_path / "onnx")
    export_torch(model, (112, 112), tmp_path / "torch")
    assert all(p.requires_grad for p in model.parameters())
    scores = EntropyScorer(kernel=entropy_maps_scattered)(images[:1, :, :112, :112].float(), 16, [2])[2]
    assert type(scores) is Tensor
    torch.testing.assert_close(scores, EntropyScorer()(images[:1, :, :112, :112], 16, [2])[2])


def test_a_full_disk_is_one_error(
    make_host: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own writer would end the process: the room is checked before anything is written."""
    monkeypatch.setattr("aptvit.storage.writing.free_bytes", lambda folder: 1000)
    with pytest.raises(WriteError, match=r"model\.pt2: the disk is full \(it needs [0-9.]+ MB"):
        export_torch(aptvit.adapt(make_host(), thresholds=6.0), (128, 128), tmp_path)
    assert not list(tmp_path.iterdir())
