"""What must hold after the statements of docs/how-to/hugging-face.md and docs/how-to/llava.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from snippets.checks import (
    Page,
    after,
    close,
    is_an_adaptive_llava,
    is_answer_of_tower,
    is_generated,
    keeps_of_each_image,
    uniform,
)
from snippets.pages import make_dinov2

from aptvit.models.checkpoints import is_new


@after("tower = aptvit.adapt(AutoModel.from_pretrained('facebook/dinov2-large'), keep=0.5)")
@torch.no_grad()
def _(page: Page) -> None:
    host, x = make_dinov2(), torch.rand(2, 3, 112, 112)
    host.load_state_dict({name: value for name, value in page.tower.state_dict().items() if not is_new(name)})
    found, expected = page.tower(x, layout=uniform(page.tower, x)), host(x)
    close(found.pooler_output, expected.pooler_output)
    close(found.last_hidden_state, expected.last_hidden_state)
    keeps_of_each_image(page.tower.layout(x), 0.5)


@after("out = tower(**processor(images, return_tensors='pt'))")
def _(page: Page) -> None:
    is_answer_of_tower(page, page.processor(page.images, return_tensors="pt")["pixel_values"])


@after("(out.pooler_output, out.last_hidden_state, out.layout)")
def _(page: Page) -> None:
    pooled, states, layout = page.value
    close(pooled, states[:, 0])  # of DINOv2 the class token
    assert states.shape == (2, layout.max_seqlen, 32)


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
