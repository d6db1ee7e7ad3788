"""`after` says what must hold after a statement of a page; most pages say it with the checks here."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import aptvit
from aptvit.models.checkpoints import is_new

# What must hold after a statement. Its names, as the page has them then, are attributes of ``page``; besides them
# ``written`` is what `prepare` returned, and ``value`` what the statement gives where it is an expression.

Page = Any
CHECKS: dict[str, Callable[[Page], None]] = {}


def normal_form(statement: str) -> str:
    """A statement, however it is written."""
    return ast.unparse(ast.parse(statement))


def after(*statements: str) -> Callable[[Callable[[Page], None]], Callable[[Page], None]]:
    def keep(check: Callable[[Page], None]) -> Callable[[Page], None]:
        CHECKS.update(dict.fromkeys(map(normal_form, statements), check))
        return check

    return keep


def is_only_a_beginning(statement: str) -> bool:
    """Whether a statement imports, names, or makes what adaptive models are made of."""
    hosts = r"timm\.create_model|load_host|Auto\w+\.from_pretrained|LlavaForConditionalGeneration\.from_pretrained|'"
    return re.match(rf"import |from |[\w, ]+ = \(?({hosts})", statement) is not None


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    scale = float(expected.detach().abs().max())
    assert scale > 1e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def as_batch(images: Any) -> Tensor:
    return images if isinstance(images, Tensor) else torch.stack(list(images))


def as_read(model: Any, images: Any) -> Tensor:
    """(B, C, H, W) as the host reads them."""
    return model.patchifier.normalization.normalised(as_batch(images))


def uniform(model: Any, images: Any) -> Any:
    """The layout in which nothing is merged."""
    batch, cells = as_batch(images), [side // model.patch_size for side in as_batch(images).shape[2:]]
    nothing = torch.zeros(len(batch), *cells, dtype=torch.int8)
    options = {"window_size": model.window_size}
    return aptvit.PatchLayout.from_scale_map(
        nothing, model.patch_size, model.num_scales, model.num_prefix_tokens, **options
    )


@torch.no_grad()
def is_the_host_with_nothing_merged(model: Any, host: Any, images: Any) -> None:
    close(model(images, layout=uniform(model, images)), host(as_read(model, images)))


@torch.no_grad()
def is_cut_by_thresholds(model: Any, images: Any, thresholds: Sequence[float]) -> None:
    """Cell by cell: the largest patch around it whose score is below the threshold of its size."""
    assert model.thresholds == tuple(thresholds)
    ((_, scores),) = model.scores(images)
    found = model.layout(images).scale_map
    expected = torch.zeros_like(found)
    for image, row, col in np.ndindex(*found.shape):
        for scale, threshold in enumerate(thresholds, start=1):
            score = scores[2**scale][image]
            place = row >> scale, col >> scale
            if all(at < size for at, size in zip(place, score.shape, strict=True)) and score[place] < threshold:
                expected[image, row, col] = scale
    assert torch.equal(found, expected) and expected.any() and not expected.all()


def keeps_of_each_image(layout: Any, keep: float, patches: int = 64) -> None:
    """Each merge saves three tokens; all images keep as many."""
    kept = patches - 3 * round((1 - keep) * patches / 3)
    assert layout.seqlens == [kept + layout.num_prefix_tokens] * layout.num_images


def covers_each_cell_once(layout: Any) -> None:
    for image, (rows, cols) in enumerate(layout.grid_sizes):
        covered = np.zeros((rows * layout.patch_size, cols * layout.patch_size), dtype=int)
        patches = layout.patches(image).tolist()
        for y, x, side in patches:
            covered[y : y + side, x : x + side] += 1
        assert (covered == 1).all()
        assert layout.seqlens[image] == len(patches) + layout.num_prefix_tokens


@torch.no_grad()
def is_for_each_image_what_it_is_alone(model: Any, images: Any, logits: Tensor) -> None:
    close(logits, torch.cat([model(image[None]) for image in as_batch(images)]))


@torch.no_grad()
def are_maps(model: Any, images: Any, maps: Sequence[Tensor], indices: Sequence[int]) -> None:
    """(B, D, H/p, W/p), every cell of a patch alike; each is that of a model that stops there."""
    layout, side = model.layout(images), model.patch_size
    height, width = as_batch(images).shape[2:]
    assert len(maps) == len(indices)
    for number, found in zip(indices, maps, strict=True):
        assert found.shape == (len(images), model.embed_dim, height // side, width // side)
        for image in range(len(images)):
            for y, x, size in (layout.patches(image) // side).tolist():
                cells = found[image, :, y : y + size, x : x + size]
                assert torch.equal(cells, cells[:, :1, :1].expand_as(cells))
        (alone,) = model.forward_intermediates(images, [number], stop_early=True, intermediates_only=True)
        close(found, alone)


@torch.no_grad()
def attends_in_windows(model: Any, images: Any, window: int, everywhere: Sequence[int]) -> None:
    """A change in one window is seen by others after the first block that attends everywhere, and not before."""
    assert (model.window_size, sorted(model.global_blocks)) == (window, sorted(everywhere))
    first = min(everywhere)
    before, layout = as_read(model, images), model.layout(images)
    changed = before.clone()
    changed[:, :, : window * model.patch_size, : window * model.patch_size] += 0.5
    maps = [
        model.forward_intermediates(x, [0, first], intermediates_only=True, layout=layout) for x in (before, changed)
    ]
    for depth, seen in enumerate((False, True)):
        difference = (maps[0][depth] - maps[1][depth]).abs().amax((0, 1))
        assert difference[:window, :window].min() > 0
        assert bool(difference[:, window:].max() > 1e-6) is seen
    part = before[:, :, :100, :90]  # is filled up to whole windows
    whole = torch.zeros_like(before)
    whole[:, :, :100, :90] = part
    close(model(part), model(whole))


def reaches_all_of(block: Any) -> bool:
    """Whether a gradient came to each parameter that can change something; biases of keys cannot."""
    return all(p.grad is not None and p.grad.any() for name, p in block.named_parameters() if "k_proj.bias" not in name)


def host_of(model: Any) -> Any:
    """timm's model with the weights of an adaptive one."""
    host = timm.create_model(model.adapter.host_config()["architecture"], num_classes=model.num_classes)
    host.load_state_dict({name: value for name, value in model.state_dict().items() if not is_new(name)})
    return host


@torch.no_grad()
def is_answer_of_tower(page: Page, pixels: Tensor) -> None:
    covers_each_cell_once(page.out.layout)
    keeps_of_each_image(page.out.layout, 0.5)
    for number in range(2):
        alone = page.tower(pixels[number : number + 1])
        close(page.out.pooler_output[number], alone.pooler_output[0])
        close(page.out.last_hidden_state[number], alone.last_hidden_state[0])


@torch.no_grad()
def is_an_adaptive_llava(model: Any, processor: Any, images: Any, prompts: list[str]) -> None:
    """As many image tokens as each picture has patches, fewer than there were; with nothing merged it is the host."""
    import tiny_llava

    thresholds = model.vision.thresholds
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    layout = model.vision.layout(inputs["pixel_values"])
    places = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert places == [length - 1 for length in layout.seqlens]
    assert sum(places) < 2 * 64 and torch.equal(torch.as_tensor(inputs["patch_scales"]), layout.scale_map)
    host, own = tiny_llava.make_llava(), tiny_llava.make_processor()
    host.load_state_dict({name: value for name, value in model.state_dict().items() if not is_new(name)})
    model.vision.thresholds = -1.0
    found, expected = (
        network(**process(images=images, text=prompts, padding=True, return_tensors="pt")).logits
        for network, process in ((model, processor), (host, own))
    )
    model.vision.thresholds = thresholds
    close(found, expected)


@torch.no_grad()
def is_generated(model: Any, inputs: Any, out: Tensor) -> None:
    """Prompts, then one likeliest word after the other: the first by the model itself."""
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"]) and out.shape[1] > length
    assert torch.equal(out[:, length], model(**inputs).logits[:, -1].argmax(-1))


@torch.no_grad()
def is_upernet(segmenter: Any, model: Any, images: Any, classes: int, indices: Sequence[int]) -> None:
    """Where nothing is merged: transformers' head on maps of four depths at four sizes, brought to full size."""
    x, layout = as_read(model, images), uniform(model, images)
    maps = model.forward_intermediates(x, indices, intermediates_only=True, layout=layout)
    training = segmenter.training
    segmenter.eval()
    levels = segmenter.backbone.neck(maps)
    assert [level.shape[-1] for level in levels] == [32, 16, 8, 4]
    assert type(segmenter.head).__name__ == "UperNetHead"
    expected = F.interpolate(segmenter.head(levels), size=x.shape[2:], mode="bilinear")
    assert expected.shape[1] == classes
    close(segmenter(x, layout), expected)
    segmenter.train(training)
