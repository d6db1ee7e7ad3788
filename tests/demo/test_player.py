"""What the page shows, beside the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data

import aptvit
from aptvit.demo import Player, Settings
from aptvit.files.images import ImageError
from aptvit.measuring.timing import count_flops

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


@torch.inference_mode()
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_shown_is_what_the_snippet_makes(player: Player, photo: torch.Tensor, settings: Settings) -> None:
    look = player.look(photo, settings)
    found: dict[str, Any] = {"images": photo[None]}
    exec(player.snippet(settings), found)
    layout = found["model"].layout(photo[None])
    assert (look.tokens, look.tokens_uniform) == (layout.num_patches, 196)
    x = found["model"].patchifier.normalization.normalised(photo[None])
    head = 2 * 192 * 1000
    uniform = count_flops(lambda: found["host"](x)) - head
    assert look.gflops_uniform == pytest.approx(uniform / 1e9, rel=1e-3)
    assert look.gflops < look.gflops_uniform
    answers = player.ask(photo, settings)
    assert answers.top is not None and answers.top_uniform is not None
    best = found["logits"].softmax(1).max()
    assert answers.top[0][1] == pytest.approx(float(best), abs=1e-5)
    assert answers.top_uniform[0][1] == pytest.approx(float(found["host"](x).softmax(1).max()), abs=1e-5)
    assert answers.seconds > 0 and answers.seconds_uniform > 0


def test_the_largest_scores(player: Player, photo: torch.Tensor) -> None:
    most = player.most(photo, "entropy", 3)
    ((_, maps),) = aptvit.adapt(timm.create_model(NAME), scales=3).scores(photo[None])
    assert most == [float(one[one.isfinite()].max()) for one in maps.values()]


def test_a_saved_model_stays_as_it_is(checkpoint: Path, photo: torch.Tensor, tmp_path: Path) -> None:
    host = timm.create_model(NAME, checkpoint_path=str(checkpoint)).eval()
    aptvit.adapt(host, thresholds=(5.0,), scorer="upsample").save_pretrained(tmp_path)
    player = Player(str(tmp_path))
    settings = player.settings()
    assert settings == Settings("upsample", 2, None, (5.0,)) and player.scales == (2, 2)
    found: dict[str, Any] = {"images": photo[None]}
    exec(player.snippet(settings), found)
    assert player.look(photo, settings).tokens == found["model"].layout(photo[None]).num_patches


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
