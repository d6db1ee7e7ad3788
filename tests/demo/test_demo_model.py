"""The results that the demo page shows, compared with the models themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from timm.data import ImageNetInfo

import aptvit
from aptvit.demo.demo_model import DemoModel, Settings
from aptvit.files.images import ImageError
from aptvit.measuring.operations import count_flops, countable_attention
from aptvit.report.drawing import side_by_side
from aptvit.report.patches import draw_layout

NAME = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptvit.demo.demo_model._TIMING_SECONDS", 0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model(NAME).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def demo_model(checkpoint: Path) -> DemoModel:
    return DemoModel(NAME, checkpoint)


@pytest.fixture(scope="module")
def image(demo_model: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    path = tmp_path_factory.mktemp("images") / "coffee.png"
    Image.fromarray(data.coffee()).save(path)
    return demo_model.read(path)


SETTINGS = [
    Settings(),
    Settings(scales=2, keep=0.6),
    Settings(keep=None),
    Settings(scales=2, keep=None),
    Settings("laplacian", 4, None, (9.0, 9.0, 9.0)),
    Settings("embedding", 2, 0.7),
]


def best(logits: torch.Tensor) -> list[tuple[str, float]]:
    """The five likeliest classes with their names, by numpy."""
    values = logits[0].double().numpy()
    shares = np.exp(values - values.max()) / np.exp(values - values.max()).sum()
    info = ImageNetInfo()
    return [(info.index_to_description(int(i)).split(",")[0], shares[i]) for i in np.argsort(-shares)[:5]]


def assert_same_classes(classes: list[tuple[str, float]] | None, logits: torch.Tensor) -> None:
    assert classes is not None
    words, shares = zip(*classes, strict=True)
    expected_words, expected_shares = zip(*best(logits), strict=True)
    assert words == expected_words
    assert shares == pytest.approx(expected_shares, rel=1e-4)


def assert_same_image(image: Image.Image, expected: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@torch.inference_mode()
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_snippet_gives_the_same_results(demo_model: DemoModel, image: torch.Tensor, settings: Settings) -> None:
    view = demo_model.view(image, settings)
    names: dict[str, Any] = {"images": image[None]}
    exec(demo_model.snippet(settings), names)
    host, model = names["host"], names["model"]
    layout = model.layout(image[None])
    assert (view.tokens, view.tokens_uniform) == (layout.num_patches, 196)
    drawings, _ = draw_layout(model.patchifier, image, True)
    assert len(drawings) == settings.scales
    assert_same_image(view.patches, drawings[0])
    assert_same_image(view.scores, side_by_side(drawings[1:]))
    x = model.patchifier.normalization.normalised(image[None])
    head = 2 * 192 * 1000
    uniform = count_flops(lambda: host(x)) - head
    assert view.gflops_uniform == pytest.approx(uniform / 1e9, rel=1e-3)
    scored = None if settings.scorer == "embedding" else layout  # this scorer runs parts of the host
    with countable_attention(model, "cpu"):
        model(x, layout=scored)
        adaptive = count_flops(lambda: model(x, layout=scored)) - head
    assert view.gflops == pytest.approx(adaptive / 1e9, rel=1e-3)
    predictions = demo_model.predict(image, settings)
    assert_same_classes(predictions.top, names["logits"])
    assert_same_classes(predictions.top_uniform, host(x))


def test_settings_are_those_of_each_visitor(demo_model: DemoModel, image: torch.Tensor) -> None:
    """All visitors share a model; each merge saves three of 196 tokens."""
    for keep in (0.6, 0.8, 0.4):
        merges = round((1 - keep) * 196 / 3)
        assert demo_model.view(image, Settings(scales=2, keep=keep)).tokens == 196 - 3 * merges
    by_thresholds = Settings(scales=2, keep=None, thresholds=(-1.0,))
    assert demo_model.view(image, by_thresholds).tokens == 196
    assert demo_model.view(image, Settings(scales=2, keep=0.4)).tokens < 80


def test_times_are_those_of_each_model(
    demo_model: DemoModel, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a run is its number of operations, times a disturbance in some rounds."""
    disturbed = [3.0, 1.0, 2.0]

    def operations(runs: Sequence[Callable[[], Any]], *_: Any) -> list[list[float]]:
        flops = [count_flops(run) / 1e9 for run in runs]
        return [[flops[0] * factor for factor in disturbed], [flops[1] * factor for factor in reversed(disturbed)]]

    monkeypatch.setattr("aptvit.demo.demo_model.interleaved", operations)
    settings = Settings(scales=2, keep=0.6)
    view, predictions = demo_model.view(image, settings), demo_model.predict(image, settings)
    head = 2 * 192 * 1000 / 1e9
    assert predictions.seconds == pytest.approx(2 * (view.gflops + head), rel=1e-3)
    assert predictions.seconds_uniform == pytest.approx(2 * (view.gflops_uniform + head), rel=1e-3)
    ratio = predictions.seconds_uniform / predictions.seconds
    assert (predictions.speedup.median, predictions.speedup.least, predictions.speedup.most) == pytest.approx(
        (ratio, ratio * 2 / 3, ratio * 3 / 2)
    )


def test_an_image_is_read_as_by_timm(demo_model: DemoModel, tmp_path: Path) -> None:
    """Resized and cropped as timm does for evaluation, upright."""
    original = Image.fromarray(data.coffee())
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(timm.create_model(NAME)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the camera lay on its side
    original.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    pixels = demo_model.read(tmp_path / "turned.png")
    assert pixels.dtype == torch.uint8
    np.testing.assert_allclose((pixels / 255 - 0.5) / 0.5, transform(original), atol=1e-6)


def test_the_largest_scores(demo_model: DemoModel, image: torch.Tensor) -> None:
    largest = demo_model.largest_scores(image, "entropy", 3)
    ((_, maps),) = aptvit.adapt(timm.create_model(NAME), scales=3).scores(image[None])
    assert largest == [float(scores[scores.isfinite()].max()) for scores in maps.values()]


@torch.inference_mode()
def test_a_saved_model_stays_as_it_is(checkpoint: Path, image: torch.Tensor, tmp_path: Path) -> None:
    host = timm.create_model(NAME, checkpoint_path=str(checkpoint)).eval()
    aptvit.adapt(host, thresholds=(5.0,), scorer="upsample").save_pretrained(tmp_path)
    demo_model = DemoModel(str(tmp_path))
    settings = demo_model.settings()
    assert settings == Settings("upsample", 2, None, (5.0,)) and demo_model.scales == (2, 2)
    names: dict[str, Any] = {"images": image[None]}
    exec(demo_model.snippet(settings), names)
    view, predictions = demo_model.view(image, settings), demo_model.predict(image, settings)
    assert view.tokens == names["model"].layout(image[None]).num_patches < view.tokens_uniform == 196
    assert_same_image(view.patches, aptvit.show(names["model"], image))
    assert_same_classes(predictions.top, names["logits"])
    assert_same_classes(predictions.top_uniform, host(names["model"].patchifier.normalization.normalised(image[None])))


def test_without_weights_there_are_no_predictions(image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptvit.hosts.pretrained._weights_at_hand", lambda *_: False)
    demo_model = DemoModel(NAME)
    predictions = demo_model.predict(image, demo_model.settings())
    assert predictions.top is None and predictions.top_uniform is None


def test_files_that_are_no_images(demo_model: DemoModel, tmp_path: Path) -> None:
    broken, huge = tmp_path / "broken.png", tmp_path / "huge.png"
    broken.write_bytes(b"no image")
    Image.fromarray(np.zeros((8000, 8000), dtype=np.uint8)).save(huge)
    with pytest.raises(ImageError, match=r"^broken\.png: not an image"):
        demo_model.read(broken)
    with pytest.raises(ImageError, match=r"^huge.png: 8000 x 8000 pixels are more than the 50,000,000"):
        demo_model.read(huge)
