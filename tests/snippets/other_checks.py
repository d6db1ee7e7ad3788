"""What must hold after the statements of the other pages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from snippets.checks import (
    Page,
    after,
    close,
    is_an_adaptive_llava,
    is_generated,
)

import aptvit
from aptvit.models.checkpoints import is_new


@after("table = pyarrow.dataset.dataset('features').to_table(columns=['file', 'feature', 'error'])")
def _(page: Page) -> None:
    assert page.table.to_pydict() == page.written


@after("picture = aptvit.show(model, 'photo.jpg', scores=True)")
def _(page: Page) -> None:
    """Enlarged and a little darker, the photo in the middle of each patch that stays small; beside it, scores."""
    with Image.open("photo.jpg") as photo:
        resized = photo.convert("RGB").resize((128, 80), Image.Resampling.BICUBIC)  # whole patches
    layout = page.model.layout(torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None])
    zoom = page.picture.height // 80
    assert page.picture.width > 2 * 128 * zoom
    found = np.asarray(page.picture).astype(int)
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


@after(
    "(model, processor) = aptvit.vlm.adapt_llava(LlavaForConditionalGeneration.from_pretrained(name), "
    "AutoProcessor.from_pretrained(name), thresholds=(5.75,))"
)
def _(page: Page) -> None:
    is_an_adaptive_llava(page.model, page.processor, page.images, page.prompts)


@after("inputs = processor(images=images, text=prompts, padding=True, return_tensors='pt')")
def _(page: Page) -> None:
    assert torch.equal(page.inputs["patch_scales"], page.model.vision.layout(page.inputs["pixel_values"]).scale_map)


@after("out = model.generate(**inputs, max_new_tokens=64)")
def _(page: Page) -> None:
    is_generated(page.model, page.inputs, page.out)
    assert page.out.shape[1] <= page.inputs["input_ids"].shape[1] + 64


@after("model.vision.keep = 0.5")
def _(page: Page) -> None:
    inputs = page.processor(images=page.images, text=page.prompts, padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == page.model.config.image_token_id).sum(1).tolist() == [31, 31]


@after("aptvit.calibrate(model.vision, inputs['pixel_values'], keep=0.5)")
def _(page: Page) -> None:
    assert page.model.vision.thresholds == page.value
    assert page.model.vision.layout(page.inputs["pixel_values"]).keep_ratio == pytest.approx(0.5, abs=0.03)


@after("parameters = aptvit.vlm.train_only(model, 'projector')")
def _(page: Page) -> None:
    left = [parameter for parameter in page.model.parameters() if parameter.requires_grad]
    projector = list(page.model.model.multi_modal_projector.parameters())
    assert list(map(id, page.parameters)) == list(map(id, left)) == list(map(id, projector))


@after("loss = model(**inputs, labels=inputs['input_ids']).loss")
def _(page: Page) -> None:
    """The mean over words, each foretold by what is before it."""
    ids = page.inputs["input_ids"]
    with torch.no_grad():
        likely = page.model(**page.inputs).logits.double().log_softmax(-1)
    each = [
        -float(likely[row, place - 1, ids[row, place]])
        for row in range(2)
        for place in range(1, ids.shape[1])
        if ids[row, place] != page.model.config.image_token_id
    ]
    assert page.loss.item() == pytest.approx(np.mean(each), rel=1e-4)


@after("(model.save_pretrained('folder'), processor.save_pretrained('folder'))")
def _(page: Page) -> None:
    names = {path.name for path in Path("folder").iterdir()}
    assert {"config.json", "model.safetensors", "aptvit.json", "aptvit.safetensors", "tokenizer.json"} <= names
    plain, new = load_file("folder/model.safetensors"), load_file("folder/aptvit.safetensors")
    assert not any(map(is_new, plain)) and all(map(is_new, new)) and new


@after("(model, processor) = aptvit.vlm.from_pretrained('folder')")
@torch.no_grad()
def _(page: Page) -> None:
    import transformers

    written = load_file("folder/model.safetensors") | load_file("folder/aptvit.safetensors")
    state = {name.removeprefix("model.vision_tower."): value for name, value in page.model.state_dict().items()}
    assert all(torch.equal(value, state[name.removeprefix("model.vision_tower.")]) for name, value in written.items())
    settings = json.loads(Path("folder/aptvit.json").read_text())["aptvit"]
    assert page.model.vision.thresholds == tuple(settings["thresholds"])
    is_an_adaptive_llava(page.model, page.processor, page.images, page.prompts)
    plain = transformers.LlavaForConditionalGeneration.from_pretrained("folder")
    assert not any(map(is_new, plain.state_dict()))
    uniform_inputs = transformers.AutoProcessor.from_pretrained("folder")(
        images=page.images, text=page.prompts, padding=True, return_tensors="pt"
    )
    page.model.vision.thresholds = -1.0
    close(plain(**uniform_inputs).logits, page.model(**uniform_inputs).logits)


@after("images, aside = hold_back(photos(['holiday/']), 0.1)")
def _(page: Page) -> None:
    """Every tenth of eighteen."""
    names = sorted(Path("holiday").iterdir())
    assert (len(page.images), len(page.aside)) == (17, 1)
    with Image.open(names[9]) as photo:
        np.testing.assert_array_equal(np.asarray(page.aside.load(0)[0]), np.asarray(photo))


@after("Training(load_recipe('heal', {'keep': 0.5}), host, images, aside, 'healed').run()")
@torch.no_grad()
def _(page: Page) -> None:
    """What docs/training.md lists is there, and the model is another one that keeps half of the tokens."""
    results = json.loads(Path("healed/results.json").read_text())
    assert results == json.loads(json.dumps(page.value))
    assert [json.loads(line) for line in Path("healed/log.jsonl").read_text().splitlines()]
    assert {"index.html", "checkpoints", "model"} <= {path.name for path in Path("healed").iterdir()}
    model = aptvit.from_pretrained("healed/model")
    assert model.num_classes == page.host.model.num_classes
    photos = torch.stack([torch.from_numpy(np.array(page.images.load(i)[0])).permute(2, 0, 1) for i in range(17)])
    assert model.layout(photos).keep_ratio == pytest.approx(0.5, abs=0.05)


@after("aptvit.calibrate(model, images, keep=0.67)")
def _(page: Page) -> None:
    assert page.model.layout(page.images).keep_ratio == pytest.approx(0.67, abs=0.03)
