"""`aptvit.show` of models with any number of channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import aptvit
from aptvit.report.drawing import draw_patches


def model_of(channels: int) -> Any:
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, in_chans=channels)
    return aptvit.adapt(host, thresholds=-1.0)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_channels_other_than_three_are_drawn_as_their_mean(channels: int) -> None:
    model, image = model_of(channels), torch.randint(0, 256, (channels, 64, 64), dtype=torch.uint8)
    gray = image.numpy().astype(np.float64).mean(0).round().astype(np.uint8)
    patches = np.array([(y, x, 16) for y in range(0, 64, 16) for x in range(0, 64, 16)])
    expected = np.asarray(draw_patches(np.repeat(gray[..., None], 3, 2), patches, 16), dtype=int)
    drawn = np.asarray(aptvit.show(model, image), dtype=int)
    assert drawn.shape == expected.shape and abs(drawn - expected).max() <= 1  # a half may be rounded either way
    assert aptvit.show(model, image, scores=True).size[0] > 2 * drawn.shape[1]


def test_files_are_read_for_one_and_three_channels_only() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    drawn = aptvit.show(model_of(1), image)
    assert drawn.tobytes() == aptvit.show(model_of(1), torch.from_numpy(np.array(image.convert("L")))[None]).tobytes()
    with pytest.raises(ValueError, match=r"reads 4 channels: show it a tensor \(C, H, W\)"):
        aptvit.show(model_of(4), image)
