"""What must hold after the statements of the pages bulk.md, demo.md and export.md of docs/how-to."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from snippets.checks import (
    Page,
    after,
    close,
)


@after("table = pyarrow.dataset.dataset('features').to_table(columns=['file', 'feature', 'error'])")
def _(page: Page) -> None:
    assert page.table.to_pydict() == page.written


@after("drawing = aptvit.show(model, 'photo.jpg', scores=True)")
def _(page: Page) -> None:
    """Enlarged and a little darker, the photo in the middle of each patch that stays small; beside it, scores."""
    with Image.open("photo.jpg") as photo:
        resized = photo.convert("RGB").resize((128, 80), Image.Resampling.BICUBIC)  # whole patches
    layout = page.model.layout(torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None])
    zoom = page.drawing.height // 80
    assert page.drawing.width > 2 * 128 * zoom
    found = np.asarray(page.drawing).astype(int)
    expected = 0.9 * np.asarray(resized.resize((128 * zoom, 80 * zoom), Image.Resampling.BICUBIC))
    for y, x, side in layout.patches(0).tolist():
        middle = tuple(slice(zoom * (start + side // 4), zoom * (start + 3 * side // 4)) for start in (y, x))
        alike = np.abs(found[middle] - expected[middle]).max() <= 1
        assert alike == (side == 16)  # others are tinted
    assert 0 < layout.keep_ratio < 1


@after("(logits, scales) = onnxruntime.InferenceSession('exported/model.onnx').run(None, {'image': pixels})")
@torch.no_grad()
def _(page: Page) -> None:
    image = torch.from_numpy(page.pixels)
    close(torch.from_numpy(page.logits), page.written(image), 1e-3)
    np.testing.assert_array_equal(page.scales, page.written.layout(image).scale_map[0])
    assert set(np.unique(page.scales)) == {0, 1}
