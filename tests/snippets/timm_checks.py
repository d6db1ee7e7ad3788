"""What must hold after the statements of the pages timm.md, batches.md, compare.md and clips.md of docs/how-to."""

from __future__ import annotations

import copy

import torch
from safetensors.torch import load_file
from snippets.checks import (
    Page,
    after,
    are_maps,
    as_read,
    close,
    host_of,
    is_the_host_with_nothing_merged,
    uniform,
)

import aptvit


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
@torch.no_grad()
def _(page: Page) -> None:
    state, written = page.model.state_dict(), load_file("folder/model.safetensors")
    host = set(host_of(page.model).state_dict())
    assert set(state) - host == {
        f"coarse_embed.{part}.{kind}" for part in ("conv", "linear") for kind in ("weight", "bias")
    }
    assert set(written) == set(state) and all(torch.equal(written[name], state[name]) for name in state)
    torch.save(page.model(page.images), "expected.pt")


@after("model = aptvit.from_pretrained('folder')")
@torch.no_grad()
def _(page: Page) -> None:
    written = load_file("folder/model.safetensors")
    assert all(torch.equal(value, written[name]) for name, value in page.model.state_dict().items())
    close(page.model(page.images), torch.load("expected.pt"))
    is_the_host_with_nothing_merged(page.model, host_of(page.model), page.images)


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


@after("baseline = aptvit.merging.tome(vit, keep=0.5)")
@torch.no_grad()
def _(page: Page) -> None:
    x = as_read(page.model, page.images)
    entering = [65]
    while len(entering) < 12:
        entering.append(entering[-1] - min(page.baseline.reduction.r[0], (entering[-1] - 1) // 2))
    assert page.baseline.tokens_per_block() == entering
    assert abs(sum(entering) / 12 - 33) < 1.5
    features = page.baseline.forward_features(x)
    close(features.size.sum(1), torch.full((2,), 65.0))
    neutral = {"tome": {"r": 0}, "evit": {"keep": 1.0}, "dtem": {"r": 0}, "random": {"keep": 1.0}}
    neutral |= {"resize": {"keep": 1.0}, "downscale": {"size": 128}}
    for name, options in neutral.items():
        peer = getattr(aptvit.merging, name)(page.vit, **options)
        close(peer(x), page.vit(x))
        close(peer.forward_head(peer.forward_features(x)), page.vit(x))


@after("logits = model.eval().forward_video(frames)")
@torch.no_grad()
def _(page: Page) -> None:
    close(page.logits[:1], page.model(page.frames[:1]))
    close(page.model.forward_video(page.frames, tolerance=-1.0), page.model(page.frames))  # nothing is reused
    still = page.model.forward_video(page.frames[:1].expand(3, -1, -1, -1))
    close(still, page.model(page.frames[:1]).expand(3, -1))
