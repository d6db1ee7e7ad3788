"""What must hold after the statements of docs/how-to/models-around-a-vit.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from snippets.checks import Page, after, close, keeps_of_each_image
from snippets.pages import make_depth_anything
from transformers import DepthAnythingForDepthEstimation


@after("model = aptvit.adapt(AutoModelForDepthEstimation.from_pretrained(name), keep=0.5, processor=processor)")
@torch.no_grad()
def _(page: Page) -> None:
    host, images = make_depth_anything(), torch.rand(2, 3, 112, 112)
    assert isinstance(page.model, DepthAnythingForDepthEstimation)
    host.load_state_dict({k: v for k, v in page.model.state_dict().items() if not k.startswith("coarse_embed")})
    close(page.model(images, keep=1.0).predicted_depth, host(images).predicted_depth)
    keeps_of_each_image(page.model.aptvit.layout(images), 0.5)


@after("depth_model = aptvit.adapt(host, keep=0.5)")
def _(page: Page) -> None:
    assert isinstance(page.depth_model, DepthAnythingForDepthEstimation)
    keeps_of_each_image(page.depth_model.aptvit.layout(torch.rand(2, 3, 112, 112)), 0.5)


@after("depth = model(**processor(images, return_tensors='pt')).predicted_depth")
def _(page: Page) -> None:
    assert page.depth.shape == (2, 112, 112)


@after("inputs = processor(images, return_tensors='pt')")
def _(page: Page) -> None:
    assert page.inputs["pixel_values"].shape == (2, 3, 112, 112)


@after("model.aptvit.keep = 0.6")
def _(page: Page) -> None:
    keeps_of_each_image(page.model.aptvit.layout(page.inputs["pixel_values"]), 0.6)


@after("few = model(**inputs, keep=0.4)")
def _(page: Page) -> None:
    layout = page.model.aptvit.layout(page.inputs["pixel_values"], keep=0.4)
    close(page.few.predicted_depth, page.model(**page.inputs, layout=layout).predicted_depth)


@after("layout = model.aptvit.layout(inputs['pixel_values'])")
def _(page: Page) -> None:
    keeps_of_each_image(page.layout, 0.6)


@after("same = model(**inputs, layout=layout)")
def _(page: Page) -> None:
    close(page.same.predicted_depth, page.model(**page.inputs).predicted_depth)


@after("model.save_pretrained('depth')")
def _(page: Page) -> None:
    assert json.loads(Path("depth", "aptvit.json").read_text())["options"]["keep"] == pytest.approx(0.6)
    assert isinstance(DepthAnythingForDepthEstimation.from_pretrained("depth"), DepthAnythingForDepthEstimation)


@after("again = aptvit.from_pretrained('depth')")
@torch.no_grad()
def _(page: Page) -> None:
    close(page.again(**page.inputs).predicted_depth, page.model(**page.inputs).predicted_depth)
