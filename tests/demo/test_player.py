"""What the page shows, beside the model itself."""

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
from aptvit.demo import Player, Settings
from aptvit.files.images import ImageError
from aptvit.measuring.operations import count_flops, countable_attention
from aptvit.report.drawing import side_by_side
from aptvit.report.patches import draw_layout

NAME = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptvit.demo.player._PATIENCE", 0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model(NAME).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def player(checkpoint: Path) -> Player:
    return Player(NAME, checkpoint)


@pytest.fixture(scope="module")
def photo(player: Player, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    path = tmp_path_factory.mktemp("photos") / "coffee.png"
    Image.fromarray(data.coffee()).save(path)
    return player.read(path)


SETTINGS = [
    Settings(),
    Settings(scales=2, keep=0.6),
    Settings(keep=None),
    Settings(scales=2, keep=None),
    Settings("laplacian", 4, None, (9.0, 9.0, 9.0)),
    Settings("embedding", 2, 0.7),
]


def best(logits: torch.Tensor) -> list[tuple[str, float]]:
    """The five likeliest classes in words, by numpy."""
    values = logits[0].double().numpy()
    shares = np.exp(values - values.max()) / np.exp(values - values.max()).sum()
    info = ImageNetInfo()
    return [(info.index_to_description(int(i)).split(",")[0], shares[i]) for i in np.argsort(-shares)[:5]]


def assert_same_answers(found: list[tuple[str, float]] | None, logits: torch.Tensor) -> None:
    assert found is not None
    words, shares = zip(*found, strict=True)
    expected_words, expected_shares = zip(*best(logits), strict=True)
    assert words == expected_words
    assert shares == pytest.approx(expected_shares, rel=1e-4)


def assert_same_picture(found: Image.Image, expected: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@torch.inference_mode()
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_shown_is_what_the_snippet_makes(player: Player, photo: torch.Tensor, settings: Settings) -> None:
    look = player.look(photo, settings)
    found: dict[str, Any] = {"images": photo[None]}
    exec(player.snippet(settings), found)
    host, model = found["host"], found["model"]
    layout = model.layout(photo[None])
    assert (look.tokens, look.tokens_uniform) == (layout.num_patches, 196)
    pictures, _ = draw_layout(model.patchifier, photo, True)
    assert len(pictures) == settings.scales
    assert_same_picture(look.patches, pictures[0])
    assert_same_picture(look.scores, side_by_side(pictures[1:]))
    x = model.patchifier.normalization.normalised(photo[None])
    head = 2 * 192 * 1000
    uniform = count_flops(lambda: host(x)) - head
    assert look.gflops_uniform == pytest.approx(uniform / 1e9, rel=1e-3)
    scored = None if settings.scorer == "embedding" else layout  # which looks through the host's eyes
    with countable_attention(model, "cpu"):
        model(x, layout=scored)
        adaptive = count_flops(lambda: model(x, layout=scored)) - head
    assert look.gflops == pytest.approx(adaptive / 1e9, rel=1e-3)
    answers = player.ask(photo, settings)
    assert_same_answers(answers.top, found["logits"])
    assert_same_answers(answers.top_uniform, host(x))


def test_settings_are_those_of_each_visitor(player: Player, photo: torch.Tensor) -> None:
    """All visitors share a model; each merge saves three of 196 tokens."""
    for keep in (0.6, 0.8, 0.4):
        merges = round((1 - keep) * 196 / 3)
        assert player.look(photo, Settings(scales=2, keep=keep)).tokens == 196 - 3 * merges
    by_thresholds = Settings(scales=2, keep=None, thresholds=(-1.0,))
    assert player.look(photo, by_thresholds).tokens == 196
    assert player.look(photo, Settings(scales=2, keep=0.4)).tokens < 80


def test_times_are_those_of_each_model(player: Player, photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes by operations, and is disturbed in some rounds."""
    disturbed = [3.0, 1.0, 2.0]

    def operations(runs: Sequence[Callable[[], Any]], *_: Any) -> list[list[float]]:
        each = [count_flops(run) / 1e9 for run in runs]
        return [[each[0] * factor for factor in disturbed], [each[1] * factor for factor in reversed(disturbed)]]

    monkeypatch.setattr("aptvit.demo.player.interleaved", operations)
    settings = Settings(scales=2, keep=0.6)
    look, answers = player.look(photo, settings), player.ask(photo, settings)
    head = 2 * 192 * 1000 / 1e9
    assert answers.seconds == pytest.approx(2 * (look.gflops + head), rel=1e-3)
    assert answers.seconds_uniform == pytest.approx(2 * (look.gflops_uniform + head), rel=1e-3)
    ratio = answers.seconds_uniform / answers.seconds
    assert (answers.speedup.median, answers.speedup.least, answers.speedup.most) == pytest.approx(
        (ratio, ratio * 2 / 3, ratio * 3 / 2)
    )


def test_a_photo_is_read_as_timm_reads_it(player: Player, tmp_path: Path) -> None:
    """Resized and cropped as timm does for evaluation, upright."""
    picture = Image.fromarray(data.coffee())
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(timm.create_model(NAME)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the camera lay on its side
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    found = player.read(tmp_path / "turned.png")
    assert found.dtype == torch.uint8
    np.testing.assert_allclose((found / 255 - 0.5) / 0.5, transform(picture), atol=1e-6)


def test_the_largest_scores(player: Player, photo: torch.Tensor) -> None:
    most = player.most(photo, "entropy", 3)
    ((_, maps),) = aptvit.adapt(timm.create_model(NAME), scales=3).scores(photo[None])
    assert most == [float(one[one.isfinite()].max()) for one in maps.values()]


@torch.inference_mode()
def test_a_saved_model_stays_as_it_is(checkpoint: Path, photo: torch.Tensor, tmp_path: Path) -> None:
    host = timm.create_model(NAME, checkpoint_path=str(checkpoint)).eval()
    aptvit.adapt(host, thresholds=(5.0,), scorer="upsample").save_pretrained(tmp_path)
    player = Player(str(tmp_path))
    settings = player.settings()
    assert settings == Settings("upsample", 2, None, (5.0,)) and player.scales == (2, 2)
    found: dict[str, Any] = {"images": photo[None]}
    exec(player.snippet(settings), found)
    look, answers = player.look(photo, settings), player.ask(photo, settings)
    assert look.tokens == found["model"].layout(photo[None]).num_patches < look.tokens_uniform == 196
    assert_same_picture(look.patches, aptvit.show(found["model"], photo))
    assert_same_answers(answers.top, found["logits"])
    assert_same_answers(answers.top_uniform, host(found["model"].patchifier.normalization.normalised(photo[None])))


def test_without_weights_there_are_no_answers(photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptvit.hosts.pretrained._weights_at_hand", lambda *_: False)
    player = Player(NAME)
    answers = player.ask(photo, player.settings())
    assert answers.top is None and answers.top_uniform is None


def test_photos_that_are_none(player: Player, tmp_path: Path) -> None:
    broken, huge = tmp_path / "broken.png", tmp_path / "huge.png"
    broken.write_bytes(b"no photo")
    Image.fromarray(np.zeros((8000, 8000), dtype=np.uint8)).save(huge)
    with pytest.raises(ImageError, match=r"broken\.png cannot be read"):
        player.read(broken)
    with pytest.raises(ImageError, match="8000x8000 pixels: make it smaller"):
        player.read(huge)
