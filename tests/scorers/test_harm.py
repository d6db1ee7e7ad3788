from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import aptvit
from aptvit.patching.layout import PatchLayout
from aptvit.scorers.harm import HarmScorer, harm_of

Host = Callable[..., Any]


@pytest.fixture
def crops(crops: Tensor) -> Tensor:
    """(40, 3, 128, 128), normalised."""
    return (crops.float() / 255 - 0.5) / 0.5


def vit(num_classes: int = 4, mixing: float = 20.0) -> Any:
    """A trained-looking ViT whose logits depend on all tokens."""
    torch.manual_seed(0)
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=128, depth=2, num_classes=num_classes, dynamic_img_size=True
    )
    for block in host.blocks:
        block.attn.proj.weight.data.mul_(mixing)
    host.pos_embed.data.mul_(0.05)  # steps so small that they are those of first order
    return host.eval()


def with_copies(model: Any, host: Any, image: Tensor, factor: int, row: int, col: int) -> Tensor:
    """Outputs of timm's blocks with the base patches of one patch replaced by copies of its token."""
    scale_map = torch.zeros(1, 8, 8, dtype=torch.int8)
    place = (slice(row * factor, (row + 1) * factor), slice(col * factor, (col + 1) * factor))
    scale_map[0][place] = factor.bit_length() - 1
    layout = PatchLayout.from_scale_map(scale_map, 16, 4, 1)
    x, _ = model.embed(image[None], layout)
    merged = x.x[0, layout.patch_index[layout.scale > 0]]  # (1, D)
    fine = host._pos_embed(host.patch_embed(image[None]))
    fine[0, 1:].view(8, 8, -1)[place] = merged
    return host.blocks(fine)


def faded(crops: Tensor, strength: float) -> Tensor:
    """Images of so little contrast that the harm is that of first order."""
    return 0.3 + strength * (crops - crops.mean((1, 2, 3), keepdim=True))


@torch.no_grad()
def test_harm_of_classes_is_the_divergence_of_the_answers(crops: Tensor) -> None:
    host = vit()
    model = aptvit.adapt(host, scales=4, keep=1.0).eval()
    images = faded(crops[:2], 0.02)
    harm = harm_of(model.packed_encoder, lambda x: model(x, keep=1.0), images, torch.Generator())
    reference = model(images, keep=1.0).double().log_softmax(1)
    for factor, cells in ((2, [(0, 0), (1, 3), (3, 2)]), (4, [(0, 1), (1, 1)]), (8, [(0, 0)])):
        for row, col in cells:
            for number, image in enumerate(images):
                tokens = with_copies(model, host, image, factor, row, col)
                change = host.forward_head(host.norm(tokens))[0].double().log_softmax(0) - reference[number]
                exact = 0.5 * float((reference[number].exp() * change.square()).sum())
                assert float(harm[factor][number, row, col]) == pytest.approx(exact, rel=0.1), (factor, row, col)


@torch.no_grad()
def test_harm_of_maps_is_the_change_of_the_maps(crops: Tensor) -> None:
    """On average over random projections."""
    host = vit()
    model = aptvit.adapt(host, scales=4, keep=1.0).eval()
    images = faded(crops[:1], 0.02)

    def maps(x: Tensor) -> Tensor:
        return model.forward_intermediates(x, layout=uniform(x), indices=1, intermediates_only=True)[0]

    reference = maps(images)
    spread = reference.var((2, 3), keepdim=True)
    spread = torch.maximum(spread, 0.01 * spread.mean(1, keepdim=True))
    random = torch.Generator().manual_seed(0)
    harm = torch.stack([harm_of(model.packed_encoder, maps, images, random)[2][0] for _ in range(60)]).mean(0)
    for row, col in ((0, 0), (2, 1), (3, 3)):
        changed = with_copies(model, host, images[0], 2, row, col)[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        exact = 0.5 * float(((changed - reference).square() / spread).sum() / reference.shape[1])
        assert float(harm[row, col]) == pytest.approx(exact, rel=0.35)


def uniform(images: Tensor) -> PatchLayout:
    grid = torch.zeros(len(images), images.shape[2] // 16, images.shape[3] // 16, dtype=torch.int8)
    return PatchLayout.from_scale_map(grid, 16, 4, 1)


def test_it_merges_what_does_less_harm_than_entropy_would(crops: Tensor) -> None:
    """Answers from the left half of the images: entropy cannot know that."""
    host, head = vit(mixing=1.0), torch.randn(192, 10, generator=torch.Generator().manual_seed(0))
    models = {name: aptvit.adapt(host, scorer=name, keep=0.6).eval() for name in ("entropy", "harm")}

    def answers(name: str, images: Tensor, keep: float) -> Tensor:
        model = models[name]
        layout = uniform(images) if keep == 1 else model.layout(images, keep=keep)
        (maps,) = model.forward_intermediates(images, layout=layout, indices=1, intermediates_only=True)
        return maps[..., :4].mean((2, 3)) @ head

    images = torch.cat([crops, crops.flip(2), crops.flip(3), crops.flip(2, 3)])
    fitted = aptvit.fit_harm(models["harm"], images.split(8), lambda x: answers("harm", x, 1.0), updates=300)
    assert fitted > 0.3
    with torch.no_grad():
        reference = answers("entropy", crops, 1.0).log_softmax(1)
        loss = {
            name: F.kl_div(answers(name, crops, 0.6).log_softmax(1), reference, log_target=True, reduction="batchmean")
            for name in models
        }
    assert loss["harm"] < 0.7 * loss["entropy"]


def test_the_host_is_not_changed_and_the_scorer_travels(make_host: Host, crops: Tensor, tmp_path: Any) -> None:
    host = make_host()
    model = aptvit.adapt(host, scorer="harm", scales=3, keep=0.6)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with pytest.raises(ValueError, match=r"not trained yet: call aptvit.fit_harm"):
        model(crops[:2])
    aptvit.fit_harm(model, crops[:8], updates=2)
    assert all(torch.equal(host.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in host.parameters())
    model.save_pretrained(tmp_path)
    again = aptvit.from_pretrained(tmp_path)
    assert isinstance(again.patchifier.scorer, HarmScorer)
    assert torch.equal(again(crops[:4]), model(crops[:4]))


def test_large_patches_count_by_what_they_save(make_host: Host, crops: Tensor) -> None:
    model = aptvit.adapt(make_host(), scorer="harm", scales=3, keep=0.6)
    aptvit.fit_harm(model, crops[:8], updates=2)
    scorer = model.patchifier.scorer
    assert isinstance(scorer, HarmScorer)
    predicted, distances = torch.zeros(1, 4, 4, 3), {2: torch.ones(1, 4, 4), 4: torch.ones(1, 2, 2)}
    assert torch.allclose(scorer._scores(predicted, distances[2], 2), torch.tensor(1 / 3))
    assert torch.allclose(scorer._scores(predicted, distances[4], 4), torch.tensor(1 / 15))


@pytest.mark.parametrize("options", [{"window_size": 4, "global_blocks": [1]}, {"thresholds": math.inf}])
def test_windows_and_thresholds(make_host: Host, crops: Tensor, options: dict[str, Any]) -> None:
    model = aptvit.adapt(make_host(), scorer="harm", **{"thresholds": math.inf, **options})
    aptvit.fit_harm(model, [*crops[:4], *crops[4:8, :, :64]], updates=2)
    assert model.layout(crops[:2]).keep_ratio == 0.25


def test_what_cannot_be_fitted_is_refused(make_host: Host, crops: Tensor) -> None:
    with pytest.raises(ValueError, match="this model predicts no harm"):
        aptvit.fit_harm(aptvit.adapt(make_host(), scorer="glance"), crops)
    model = aptvit.adapt(make_host(), scorer="harm", keep=0.5)
    for answers, message in (
        (lambda x: torch.rand(len(x), 3, requires_grad=True) * 2, "do not come from this model"),
        (lambda x: model(F.interpolate(x, 64), keep=1.0), "tokens instead of"),
        (lambda x: model(x, keep=1.0).sum(1), "neither logits"),
        (lambda x: model(x, keep=1.0).detach(), "without gradients"),
    ):
        with pytest.raises(ValueError, match=message):
            aptvit.fit_harm(model, crops[:2], answers, updates=1)


@pytest.mark.parametrize("has_classes", [True, False])
def test_towers_of_transformers(has_classes: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config |= {"image_size": 64, "patch_size": 8}
    if has_classes:
        host = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=5, **config))
    else:
        host = transformers.Dinov2Model(transformers.Dinov2Config(**config))
    model = aptvit.adapt(host.eval(), scorer="harm", keep=0.5)
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert math.isnan(aptvit.fit_harm(model, images[:2], updates=4))  # too few to hold one back
    aptvit.fit_harm(model, images, updates=4)
    assert model.layout(images).keep_ratio == pytest.approx(0.5, abs=0.05)
