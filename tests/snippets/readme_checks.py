"""What must hold after the statements of README.md."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from snippets.checks import (
    Page,
    after,
    are_maps,
    as_read,
    attends_in_windows,
    close,
    covers_each_cell_once,
    host_of,
    is_an_adaptive_llava,
    is_answer_of_tower,
    is_cut_by_thresholds,
    is_for_each_image_what_it_is_alone,
    is_generated,
    is_the_host_with_nothing_merged,
    is_upernet,
    keeps_of_each_image,
    uniform,
)
from snippets.pages import make_dinov2
from torch import Tensor

import aptvit
from aptvit.measuring.operations import count_flops, countable_attention
from aptvit.models.checkpoints import is_new


@after("model = aptvit.adapt(vit, keep=0.5)")
def _(page: Page) -> None:
    is_the_host_with_nothing_merged(page.model, page.vit, page.images)
    keeps_of_each_image(page.model.layout(page.images), 0.5)


@after("logits = model(images)")
@torch.no_grad()
def _(page: Page) -> None:
    is_for_each_image_what_it_is_alone(page.model, page.images, page.logits)
    mixed = [page.images[0], page.images[1][:, :96, :64]]
    close(page.model(mixed), torch.cat([page.model(image[None]) for image in mixed]))


@after("model = aptvit.adapt(vit, thresholds=(5.5, 4.0))")
def _(page: Page) -> None:
    is_the_host_with_nothing_merged(page.model, page.vit, page.images)
    is_cut_by_thresholds(page.model, page.images, (5.5, 4.0))


@after("aptvit.calibrate(model, sample_images, keep=0.5)")
def _(page: Page) -> None:
    assert page.value == page.model.thresholds and len(page.value) == 2
    assert page.model.layout(page.sample_images).keep_ratio == pytest.approx(0.5, abs=0.06)  # 4x patches are 15 tokens


@after("aptvit.calibrate(model, batches, gflops=30)")
@torch.no_grad()
def _(page: Page) -> None:
    head = 2 * page.vit.head.weight.numel()
    with countable_attention(page.model, "cpu"):
        page.model(page.images)
        each = [count_flops(lambda image=image: page.model(image[None])) - head for image in page.images]
    assert np.mean(each) / 1e9 == pytest.approx(0.03, rel=0.06)


@after("model.thresholds = (6.0, 6.0)")
def _(page: Page) -> None:
    is_cut_by_thresholds(page.model, page.images, (6.0, 6.0))


@after("logits = model(images, keep=0.3)")
@torch.no_grad()
def _(page: Page) -> None:
    close(page.logits, aptvit.adapt(page.vit, keep=0.3, scales=3)(page.images))
    assert page.model.thresholds == (6.0, 6.0) and page.model.keep is None


@after("layout = model.layout(images)")
def _(page: Page) -> None:
    covers_each_cell_once(page.layout)
    kept = sum(len(page.layout.patches(image)) for image in range(2))
    assert page.layout.keep_ratio == kept / 128 < 1


@after("model = aptvit.adapt(vit, **aptvit.read_config('config.json'))")
def _(page: Page) -> None:
    is_the_host_with_nothing_merged(page.model, page.vit, page.images)
    is_cut_by_thresholds(page.model, page.images, page.written.thresholds)


def noise(count: int, side: int) -> Tensor:
    """Pictures in which there is nothing to merge."""
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


@after("model = aptvit.adapt(vit, thresholds=(6.0,), max_tokens=300, max_batch_tokens=2048)")
def _(page: Page) -> None:
    is_cut_by_thresholds(page.model, page.images, (6.0,))  # which need no limits
    assert aptvit.adapt(page.vit, thresholds=(6.0,)).layout(noise(1, 320)).seqlens == [401]
    assert 297 < page.model.layout(noise(1, 320)).max_seqlen <= 300
    few = page.model.layout(noise(8, 320))
    assert 2045 < few.num_tokens <= 2048 and few.max_seqlen <= 300


@after("model = aptvit.adapt(vit, thresholds=(6.0,), min_keep=0.3)")
def _(page: Page) -> None:
    gray = torch.full_like(page.images, 128)
    assert aptvit.adapt(page.vit, thresholds=(6.0,)).layout(gray).keep_ratio == 0.25
    assert 0.3 <= page.model.layout(gray).keep_ratio < 0.3 + 3 / 64
    is_cut_by_thresholds(page.model, page.images, (6.0,))


@after("model = aptvit.adapt(vit, blend=0.5)")
def _(page: Page) -> None:
    photos = torch.cat([page.images, torch.full_like(page.images[:1], 128)])
    aptvit.calibrate(page.model, photos, keep=0.5)
    blended = page.model.layout(photos)
    assert blended.keep_ratio == pytest.approx(0.5, abs=0.03)
    by_share, by_thresholds = (
        aptvit.adapt(page.vit, **options).layout(photos).seqlens
        for options in ({"keep": page.model.keep}, {"thresholds": page.model.thresholds})
    )
    assert len(set(by_share)) == 1 and len(set(by_thresholds)) > 1
    for found, share, threshold in zip(blended.seqlens, by_share, by_thresholds, strict=True):
        assert abs(found - (share + threshold) / 2) <= 1.5  # three tokens a merge


@after("model = aptvit.from_pretrained('healed/model')")
@torch.no_grad()
def _(page: Page) -> None:
    assert not page.model.training and page.model.thresholds == page.written.thresholds
    assert torch.equal(page.model(page.images), page.written(page.images))


@after("rival = aptvit.merging.tome(vit, r=13)")
@torch.no_grad()
def _(page: Page) -> None:
    x = as_read(page.model, page.images)
    entering = [65]
    while len(entering) < 12:
        entering.append(entering[-1] - min(13, (entering[-1] - 1) // 2))
    assert page.rival.tokens_per_block() == entering
    features = page.rival.forward_features(x)
    close(features.size.sum(1), torch.full((2,), 65.0))
    neutral = {"tome": {"r": 0}, "evit": {"keep": 1.0}, "dtem": {"r": 0}, "random": {"keep": 1.0}}
    neutral |= {"resize": {"keep": 1.0}, "downscale": {"size": 128}}
    for name, options in neutral.items():
        peer = getattr(aptvit.merging, name)(page.vit, **options)
        close(peer(x), page.vit(x))
        close(peer.forward_head(peer.forward_features(x)), page.vit(x))


@after("logits = predict(model, images, max_tokens=8192)")
@torch.no_grad()
def _(page: Page) -> None:
    close(page.logits, page.model(page.images))
    mixed = [page.images[1][:, :96, :64], page.images[0], page.images[1]]
    found = page.predict(page.model, iter(mixed), max_tokens=100)
    close(found, torch.cat([page.model(image[None]) for image in mixed]))


@after(
    """
for pack in TokenBudgetBatcher(model, images, max_tokens=8192):
    logits = model(pack.images, layout=pack.layout)
"""
)
@torch.no_grad()
def _(page: Page) -> None:
    close(page.logits, page.model(page.images[page.pack.index]))
    assert page.pack.index == [0, 1]  # as many as fit
    single = [pack.index for pack in page.TokenBudgetBatcher(page.model, page.images, max_tokens=65)]
    assert single == [[0], [1]]


@after(
    """
for batch, layout in score_ahead(model, batches):
    logits = model(batch, layout=layout)
"""
)
@torch.no_grad()
def _(page: Page) -> None:
    assert page.batch is page.batches[-1]
    close(page.logits, page.model(page.batch))


@after("pooled = model.forward_head(model.forward_features(images), pre_logits=True)")
@torch.no_grad()
def _(page: Page) -> None:
    close(page.model.get_classifier()(page.pooled), page.model(page.images))
    host = host_of(page.model)
    is_the_host_with_nothing_merged(page.model, host, page.images)


@after("maps = model.forward_intermediates(images, indices=[3, 7, 11], intermediates_only=True)")
@torch.no_grad()
def _(page: Page) -> None:
    indices = [3, 7, 11]
    are_maps(page.model, page.images, page.maps, indices)
    found = page.model.forward_intermediates(
        page.images, indices=indices, intermediates_only=True, layout=uniform(page.model, page.images)
    )
    x = as_read(page.model, page.images)
    expected = host_of(page.model).forward_intermediates(x, indices=indices, intermediates_only=True)
    for ours, timms in zip(found, expected, strict=True):
        close(ours, timms)


@after("model.reset_classifier(10)")
@torch.no_grad()
def _(page: Page) -> None:
    head = page.model.get_classifier()
    assert page.model.num_classes == 10 and head.weight.shape == (10, 64)
    close(page.model(page.images), page.pooled @ head.weight.T + head.bias)


@after("model.set_grad_checkpointing()")
def _(page: Page) -> None:
    calls: list[int] = []
    gradients = []
    for checkpointing, expected in ((True, 2), (False, 1)):
        model = copy.deepcopy(page.model).train()
        if not checkpointing:
            model.set_grad_checkpointing(False)
        calls.clear()
        model.adapter.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        model(page.images).square().sum().backward()
        assert len(calls) == expected  # once more in the backward pass
        gradients.append(model.adapter.blocks[0].mlp.fc1.weight.grad)
    close(*gradients)


@after("model.compile()")
@torch.no_grad()
def _(page: Page) -> None:
    """One graph for twelve blocks, or a second one as soon as a number of tokens is seen to change."""
    eager = copy.deepcopy(page.model)
    made = torch._dynamo.utils.counters["stats"]
    before, graphs = made["unique_graphs"], []
    for keep in (0.8, 0.7, 0.6, 0.5, 0.4):
        close(page.model(page.images, keep=keep), eager(page.images, keep=keep))
        graphs.append(made["unique_graphs"] - before)
    assert 1 <= graphs[0] <= graphs[1] <= 2 and set(graphs[1:]) == {graphs[1]}


@after("model.use_cuda_graphs()")
@torch.no_grad()
def _(page: Page) -> None:
    close(page.model(page.images), copy.deepcopy(page.model)(page.images))
    assert page.model.token_bucket == 256


@after("model.save_pretrained('folder')")
def _(page: Page) -> None:
    state, written = page.model.state_dict(), load_file("folder/model.safetensors")
    host = set(host_of(page.model).state_dict())
    assert set(state) - host == {
        f"coarse_embed.{part}.{kind}" for part in ("conv", "linear") for kind in ("weight", "bias")
    }
    assert set(written) == set(state) and all(torch.equal(written[name], state[name]) for name in state)


@after("model = aptvit.from_pretrained('folder')")
@torch.no_grad()
def _(page: Page) -> None:
    written = load_file("folder/model.safetensors")
    assert all(torch.equal(value, written[name]) for name, value in page.model.state_dict().items())
    close(page.model(page.images), page.model.get_classifier()(page.pooled))
    is_the_host_with_nothing_merged(page.model, host_of(page.model), page.images)


@after("tower = aptvit.adapt(AutoModel.from_pretrained('facebook/dinov2-large'), keep=0.5)")
@torch.no_grad()
def _(page: Page) -> None:
    host, x = make_dinov2(), torch.rand(2, 3, 112, 112)
    host.load_state_dict({name: value for name, value in page.tower.state_dict().items() if not is_new(name)})
    found, expected = page.tower(x, layout=uniform(page.tower, x)), host(x)
    close(found.pooler_output, expected.pooler_output)
    close(found.last_hidden_state, expected.last_hidden_state)
    keeps_of_each_image(page.tower.layout(x), 0.5)


@after("out = tower(**image_processor(images, return_tensors='pt'))")
def _(page: Page) -> None:
    is_answer_of_tower(page, page.image_processor(page.images, return_tensors="pt")["pixel_values"])


@after("out = tower(**processor(images, return_tensors='pt'))")
def _(page: Page) -> None:
    is_answer_of_tower(page, page.processor(page.images, return_tensors="pt")["pixel_values"])


@after("(out.pooler_output, out.last_hidden_state, out.layout)")
def _(page: Page) -> None:
    pooled, states, layout = page.value
    close(pooled, states[:, 0])  # of DINOv2 the class token
    assert states.shape == (2, layout.max_seqlen, 32)


@after("(llava, processor) = aptvit.vlm.adapt_llava(llava, processor, thresholds=(5.75,))")
def _(page: Page) -> None:
    is_an_adaptive_llava(page.llava, page.processor, page.images, page.prompts)


@after("out = llava.generate(**processor(images=images, text=prompts, padding=True, return_tensors='pt'))")
def _(page: Page) -> None:
    inputs = page.processor(images=page.images, text=page.prompts, padding=True, return_tensors="pt")
    is_generated(page.llava, inputs, page.out)


@after("logits = model.eval().forward_video(frames)")
@torch.no_grad()
def _(page: Page) -> None:
    close(page.logits[:1], page.model(page.frames[:1]))
    close(page.model.forward_video(page.frames, tolerance=-1.0), page.model(page.frames))  # nothing is reused
    still = page.model.forward_video(page.frames[:1].expand(3, -1, -1, -1))
    close(still, page.model(page.frames[:1]).expand(3, -1))


@after("model = aptvit.adapt(vit, keep=0.7, window_size=16, global_blocks=[2, 5, 8, 11], pad=True)")
def _(page: Page) -> None:
    keeps_of_each_image(page.model.layout(page.images), 0.7)
    attends_in_windows(page.model, page.images, 4, [2, 5, 8, 11])


@after("detector = aptvit.dense.make_detector(model, num_classes=80)")
@torch.no_grad()
def _(page: Page) -> None:
    from torchvision.models.detection import FasterRCNN

    assert isinstance(page.detector, FasterRCNN)
    assert page.detector.roi_heads.box_predictor.cls_score.out_features == 81  # and the background
    x = as_read(page.model, page.images)
    (last,) = page.model.forward_intermediates(x, 1, intermediates_only=True, layout=uniform(page.model, x))
    levels = page.detector.backbone(x, uniform(page.model, x))
    assert [level.shape[-1] for level in levels.values()] == [32, 16, 8, 4, 2]
    close(levels["2"], page.detector.backbone.neck(last)["2"])


@after("segmenter = aptvit.dense.make_segmenter(model, num_classes=150)")
def _(page: Page) -> None:
    is_upernet(page.segmenter, page.model, page.images, 150, [2, 5, 8, 11])
