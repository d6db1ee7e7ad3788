from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aptvit
from aptvit.patching import entropy
from aptvit.patching.layouts import layout_of_images
from aptvit.patching.patchifier import Patchifier

Host = Callable[..., Any]
THRESHOLDS = (6.5, 6.5)  # of the photos some patches of every scale pass, and some do not


def run(model: nn.Module, images: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(images, **options)


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.fixture
def model(make_host: Host, images: Tensor) -> Any:
    """An adaptive model whose every parameter matters, and which merges at all three scales."""
    model = aptvit.adapt(make_host(), thresholds=THRESHOLDS, init="nonzero")
    layout = model.layout(images)
    assert len(set(layout.seqlens)) > 1 and all(sum(n) for n in zip(*layout.counts, strict=True))
    return model


# Images


def test_raw_images_are_normalised_ones(make_host: Host, photo_batch: Tensor) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = aptvit.adapt(make_host(), keep=0.5, scales=3, mean=mean, std=std)
    normalised = (photo_batch / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert relative_error(run(model, photo_batch), run(model, normalised)) <= 1e-5
    assert relative_error(run(model, list(photo_batch)), run(model, normalised)) <= 1e-5


def test_the_hosts_statistics_are_the_default(make_host: Host) -> None:
    host = make_host()
    host.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert aptvit.adapt(host).patchifier.mean == (0.1, 0.2, 0.3)
    assert aptvit.adapt(host).patchifier.std == (0.4, 0.5, 0.6)
    assert aptvit.adapt(host, mean=(0.5,), std=(0.25,)).patchifier.mean == (0.5,) * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("with_numba", [False, True])
def test_an_image_that_is_not_finite_is_named(
    model: Any, images: Tensor, bad: float, with_numba: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_numba:
        monkeypatch.setattr(entropy, "has_numba", lambda: False)
    broken = images.clone()
    broken[3, 1, 5, 5] = bad
    for batch in (broken, list(broken)):
        with pytest.raises(ValueError, match="image 3 holds NaN or infinite"):
            run(model, batch)


def test_sizes_that_do_not_hold_whole_coarse_patches_work(make_host: Host, photos: list[Tensor]) -> None:
    """224 = 3.5 x 64 and 240 x 176 = 3.75 x 2.75 of the largest patches; the released code fails on them."""
    model = aptvit.adapt(make_host(img_size=224), thresholds=(9.5, 9.5))
    images = [photos[0][:, :224, :224], photos[1][:, :240, :176], photos[2][:, :16, :32], photos[2][:, :32, :16]]
    layout = model.layout(images)
    assert layout.counts == [[0, 13, 9], [25, 11, 6], [2, 0, 0], [2, 0, 0]]
    joint = run(model, images)
    assert joint.isfinite().all()
    assert relative_error(joint, torch.cat([run(model, image[None]) for image in images])) <= 1e-5


def test_padding(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(), thresholds=THRESHOLDS, pad=True)
    padded = torch.nn.functional.pad(images[:, :, :100, :70], (0, 10, 0, 12))
    assert torch.equal(run(model, images[:, :, :100, :70]), run(model, padded))
    with pytest.raises(ValueError, match="96x64 or 112x80"):
        run(aptvit.adapt(make_host()), images[:, :, :100, :70])


# Budget


def test_setting_the_budget_changes_what_is_merged(model: Any, images: Tensor) -> None:
    assert (model.thresholds, model.keep, model.num_scales) == (THRESHOLDS, None, 3)
    some = model.layout(images).keep_ratio
    model.thresholds = (-1.0, -1.0)
    assert model.layout(images).keep_ratio == 1
    model.keep = 0.3
    assert (model.thresholds, model.keep, model.num_scales) == (None, 0.3, 3)
    assert model.layout(images).keep_ratio == pytest.approx(0.3, abs=2 / 64)
    model.thresholds = 6.5
    assert (model.thresholds, model.keep, model.num_scales) == ((6.5,), None, 2)
    assert some <= model.layout(images).keep_ratio < 1
    before = run(model, images)
    model.thresholds = (6.5, -1.0)
    assert relative_error(run(model, images), before) <= 1e-6


def test_wrong_options_are_refused(make_host: Host) -> None:
    host = make_host()
    for options, message in (
        ({"thresholds": 5.0, "keep": 0.5}, "not both"),
        ({"thresholds": 5.0, "scales": 4}, "1 thresholds make 2 scales"),
        ({"thresholds": (math.nan,)}, "must be numbers"),
        ({"thresholds": "5.5"}, "must be numbers"),
        ({"keep": 0.0}, "share of the patch tokens"),
        ({"keep": math.nan}, "share of the patch tokens"),
        ({"scales": 0}, "whole number from 1"),
        ({"scales": 2.5}, "whole number from 1"),
        ({"scorer": "sharpness"}, "unknown scorer"),
        ({"init": "ones"}, "unknown init"),
        ({"mean": (0.5, 0.5)}, "2 values for 3 channels"),
        ({"mean": (123.675, 116.28, 103.53)}, r"mean=\(123.675, .* scale of 0 to 255: give it divided by 255"),
        ({"std": (58.395,)}, r"std=\(58.395,\) is on the scale of 0 to 255: give it divided by 255"),
    ):
        with pytest.raises(ValueError, match=message):
            aptvit.adapt(host, **options)
    model = aptvit.adapt(host, thresholds=(5.0, 4.0))
    with pytest.raises(ValueError, match="must be numbers"):
        model.thresholds = (5.0, None)
    with pytest.raises(ValueError, match="share"):
        model.keep = 2.0
    assert (model.thresholds, model.keep) == ((5.0, 4.0), None)
    with pytest.raises(TypeError):
        aptvit.adapt(host, threshold=5.0)


def test_a_scorer_of_the_wrong_shape_is_refused(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(), thresholds=1.0, scorer=lambda pixels, patch, factors: {2: pixels[:, 0]})
    with pytest.raises(ValueError, match=r"of shapes {2: \(5, 4, 4\)}; it returned {2: \(5, 128, 128\)}"):
        run(model, images)


def test_resize_only_is_the_branch_at_zero(make_host: Host, images: Tensor) -> None:
    host = make_host()
    resized = run(aptvit.adapt(host, thresholds=THRESHOLDS, resize_only=True), images)
    assert relative_error(run(aptvit.adapt(host, thresholds=THRESHOLDS), images), resized) <= 1e-6
    assert relative_error(run(aptvit.adapt(host, thresholds=THRESHOLDS, init="residual"), images), resized) > 1e-3


# A layout that is known already


@pytest.fixture
def known(model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The layout of the images, and from here on no scoring."""
    layout = model.layout(images)

    def never(*_: object) -> Any:
        raise AssertionError("scored although the layout is known")

    monkeypatch.setattr(model.patchifier, "scorer", never)
    monkeypatch.setattr(Patchifier, "__call__", never)
    return layout


def test_a_known_layout_gives_the_same_without_scoring(model: Any, images: Tensor, request: Any) -> None:
    expected, expected_maps = run(model, images), model.forward_intermediates(images, intermediates_only=True)
    layout = request.getfixturevalue("known")
    for given in (images, list(images)):
        assert torch.equal(run(model, given, layout=layout), expected)
        with torch.no_grad():
            features = model.forward_features(given, layout)
            assert features.layout is layout
            assert torch.equal(model.forward_head(features), expected)
        features = model.forward_features(given, layout)
        torch.testing.assert_close(model.forward_head(features), expected, rtol=1e-5, atol=1e-5)
        last, maps = model.forward_intermediates(given, layout=layout)
        assert last.layout is layout and torch.equal(last.tokens, features.tokens)
        assert all(torch.equal(got, one) for got, one in zip(maps, expected_maps, strict=True))


def test_a_known_layout_of_images_of_different_sizes(model: Any, images: Tensor) -> None:
    mixed = [images[0], images[1][:, :64], images[2][:, :, 32:], images[3][:, :64]]
    expected, (_, expected_maps) = run(model, mixed), model.forward_intermediates(mixed)
    layouts = [model.layout(mixed[:2]), model.layout(mixed[2:])]
    layout = layout_of_images([(one, i) for one in layouts for i in range(2)])
    assert torch.equal(run(model, mixed, layout=layout), expected)
    _, maps = model.forward_intermediates(mixed, layout=layout)
    for got, one in zip(maps, expected_maps, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, one, strict=True))


def test_the_layout_decides_and_not_the_models_thresholds(model: Any, images: Tensor) -> None:
    expected = run(model, images)
    layout = model.layout(images)
    model.thresholds = -1.0  # another number of scales, too
    assert relative_error(run(model, images), expected) > 1e-3
    assert torch.equal(run(model, images, layout=layout), expected)
    # and what is not in the images can be decided by hand
    coarse = aptvit.PatchLayout.from_scale_map(torch.ones_like(layout.scale_map), 16, 2, model.num_prefix_tokens)
    model.thresholds = 99.0
    assert relative_error(run(model, images, layout=coarse), run(model, images)) <= 1e-6


def test_gradients_with_a_known_layout_are_the_same(model: Any, images: Tensor) -> None:
    model.train()
    layout = model.layout(images)
    grads = []
    for options in ({}, {"layout": layout}):
        model.zero_grad()
        model(images, **options).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for got, one in zip(*grads, strict=True):
        assert torch.equal(got, one) or relative_error(got, one) <= 1e-6


def test_padded_and_raw_images_take_a_known_layout(make_host: Host, photo_batch: Tensor) -> None:
    model = aptvit.adapt(make_host(), thresholds=THRESHOLDS, init="nonzero", pad=True)
    cropped = photo_batch[:, :, :100, :70]
    assert torch.equal(run(model, cropped, layout=model.layout(cropped)), run(model, cropped))


def test_a_layout_of_other_images_or_of_another_model_is_refused(make_host: Host, model: Any, images: Tensor) -> None:
    layout = model.layout(images)
    scale_map = torch.zeros(5, 8, 8, dtype=torch.int8)
    for call in (model, model.forward_features, model.forward_intermediates):
        for patch_size, prefix in ((16, 0), (14, 1)):
            other = aptvit.PatchLayout.from_scale_map(scale_map, patch_size, 3, prefix)
            message = rf"patch size, prefix tokens\) \({patch_size}, {prefix}\), the model \(16, 1\): use model.layout"
            with pytest.raises(ValueError, match=message):
                call(images, layout=other)
        with pytest.raises(ValueError, match=r"5 images, .* \(8, 8\) patches; these are 4, .* on the same images"):
            call(images[:4], layout=layout)
        with pytest.raises(ValueError, match=r"\(8, 8\) patches; these are 5, the first with \(4, 8\): use model"):
            call(images[:, :, :64], layout=layout)
        with pytest.raises(ValueError, match=r"use model\.layout on the same images"):
            call([*images[:4], images[4][:, :64]], layout=layout)
    swapped = [images[0][:, :64], *images[1:]]
    with pytest.raises(ValueError, match=r"use model\.layout on the same images"):
        run(model, swapped, layout=model.layout(swapped[::-1]))


# Values kept between calls


def change_in_place(model: Any) -> None:
    with torch.no_grad():
        model.coarse_embed.conv.weight.mul_(1.5)


def change_position(model: Any) -> None:
    with torch.no_grad():
        model.pos_embed.mul_(1.5)


def change_by_optimizer(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model(torch.rand(1, 3, 128, 128)).square().sum().backward()
    optimizer.step()


def change_by_loading(model: Any) -> None:
    model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()})


def change_by_assigning(model: Any) -> None:
    model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()}, assign=True)


def change_behind_the_back(model: Any) -> None:
    model.patch_embed.proj.weight.data.mul_(1.5)
    model.eval()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_position,
        change_by_optimizer,
        change_by_loading,
        change_by_assigning,
        change_behind_the_back,
    ],
)
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_changed_weights_are_seen(model: Any, images: Tensor, change: Callable[[Any], None], off: Any) -> None:
    with off():
        before = model(images)
        assert torch.equal(model(images), before)
    change(model)
    with off():
        after = model(images)
    fresh = copy.deepcopy(model)  # starts with nothing kept
    assert relative_error(after, before) > 1e-4
    assert relative_error(after, run(fresh, images)) <= 1e-6


def test_gradients_are_the_same_after_evaluation(model: Any, images: Tensor) -> None:
    model(images).sum().backward()
    expected = model.coarse_embed.conv.weight.grad.clone()
    model.zero_grad()
    with torch.inference_mode():
        model(images)
    run(model, images)
    model(images).sum().backward()
    torch.testing.assert_close(model.coarse_embed.conv.weight.grad, expected)


def test_one_model_serves_several_threads(model: Any, images: Tensor) -> None:
    expected = [run(model, images[: i + 1]) for i in range(4)]
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            got[i] = run(model, images[: i + 1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert relative_error(got[i], expected[i]) <= 1e-5


# Copies and precisions


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_gives_the_same_logits_and_stands_alone(
    model: Any, images: Tensor, copied: Callable[[Any], Any]
) -> None:
    before = run(model, images)
    other = copied(model)
    assert torch.equal(run(other, images), before)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    other.thresholds = -1.0
    other.reset_classifier(3)
    other.load_state_dict({key: torch.zeros_like(value) for key, value in other.state_dict().items()})
    assert run(other, images).tolist() == [[0.0] * 3] * 5  # all parts of the copy see its own weights
    assert torch.equal(run(model, images), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_other_precisions(make_host: Host, images: Tensor, name: str, dtype: torch.dtype, used_before: bool) -> None:
    model = aptvit.adapt(make_host(name), thresholds=THRESHOLDS, init="nonzero", mean=(0.5,), std=(0.5,))
    expected = run(copy.deepcopy(model), images)
    if used_before:
        run(model, images)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    got = run(model, images)
    assert got.dtype == dtype
    assert relative_error(got, expected) < (1e-5 if dtype == torch.float64 else 0.06)
    mixed = run(model, [images[0, :, :64], images[1], images[2, :, :64]])
    assert relative_error(mixed[1:2], got[1:2]) < 0.06


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_autocast_is_close_and_trains(make_host: Host, images: Tensor, name: str) -> None:
    model = aptvit.adapt(make_host(name), thresholds=THRESHOLDS, init="nonzero", mean=(0.5,), std=(0.5,))
    expected = run(copy.deepcopy(model), images)  # the model itself meets its weights under autocast first
    with torch.autocast("cpu", torch.bfloat16):
        got = run(model, images)
        loss = model(images).float().square().mean()
    assert 0 < relative_error(got, expected) < 0.06
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())
    assert relative_error(run(model, images), expected) <= 1e-6  # nothing of half precision was kept


# Training


def test_every_parameter_gets_a_gradient_even_where_a_scale_is_empty(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(), thresholds=(-1.0, -1.0)).train()
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all((p.grad == 0).all() for p in model.coarse_embed.parameters())
    model = aptvit.adapt(make_host(), thresholds=(99.0, 99.0)).train()  # no base patch
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.coarse_embed.linear.weight.grad.abs().max() > 0


def test_gradients_of_a_batch_are_those_of_its_images(model: Any, images: Tensor) -> None:
    model.train()
    model(images).square().sum().backward()
    joint = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for image in images:
        model(image[None]).square().sum().backward()
    for name, p in model.named_parameters():
        assert relative_error(joint[name], p.grad) <= 1e-4, name


def test_training_learns_with_merges(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(), thresholds=THRESHOLDS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    target = torch.arange(5)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert model.coarse_embed.linear.weight.abs().max() > 0


def test_stochastic_depth_draws_for_each_image(make_host: Host, images: Tensor) -> None:
    """The released code lets a whole packed batch share one draw."""
    model = aptvit.adapt(make_host(drop_path_rate=0.9), thresholds=THRESHOLDS)
    same = images[:1].expand(16, -1, -1, -1)
    logits = run(model, same)
    assert relative_error(logits, logits[:1].expand_as(logits)) <= 1e-5
    model.train()
    logits = run(model, same)
    assert len({round(float(value), 3) for value in logits[:, 0]}) > 1
    assert len({round(float(value), 3) for value in logits[:, 0]}) <= 4  # two branches of the last block, kept or not


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_mixed_224"])
def test_checkpointing_gives_the_same_gradients(
    make_host: Host, images: Tensor, name: str, drop_path_rate: float
) -> None:
    host = make_host(name, drop_path_rate=drop_path_rate)
    model = aptvit.adapt(host, thresholds=THRESHOLDS, init="nonzero", mean=(0.5,), std=(0.5,)).train()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        logits = model(images)
        logits.square().sum().backward()
        grads.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed) or relative_error(recomputed, plain) <= 1e-6


def test_checkpointing_runs_each_block_twice(model: Any, images: Tensor) -> None:
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.train().set_grad_checkpointing()
    model(images).sum().backward()
    assert len(calls) == 2
    model.eval()
    model(images).sum().backward()
    assert len(calls) == 3


# Compiled


def test_compiled_blocks_give_the_same_logits(model: Any, images: Tensor) -> None:
    torch.compiler.reset()
    before, few = run(model, images), run(model, images[:2])
    model.compile(backend="eager", fullgraph=True)
    assert relative_error(run(model, images), before) <= 1e-5
    assert relative_error(run(model, images[:2]), few) <= 1e-5
    assert relative_error(run(model, images[:1]), before[:1]) <= 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_compiled_blocks_give_the_same_gradients(make_host: Host, images: Tensor, drop_path_rate: float) -> None:
    torch.compiler.reset()
    model = aptvit.adapt(make_host(depth=1, drop_path_rate=drop_path_rate), thresholds=THRESHOLDS, init="nonzero")
    model.train()
    results = []
    for compiled in (False, True):
        if compiled:
            model.compile(backend="aot_eager")
        model.zero_grad()
        torch.manual_seed(5)
        logits = model(images)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, fast in zip(*results, strict=True):
        assert relative_error(fast, eager) <= 1e-4
    torch.compiler.reset()


# Features


def test_features_are_packed_with_their_layout(model: Any, images: Tensor) -> None:
    with torch.no_grad():
        features = model.forward_features(images)
    assert isinstance(features, aptvit.PackedFeatures) and isinstance(features.layout, aptvit.PatchLayout)
    assert features.tokens.shape == (features.layout.num_tokens, 192)
    assert features.layout.seqlens == model.layout(images).seqlens
    maps = features.feature_maps()
    assert isinstance(maps, Tensor) and maps.shape == (5, 192, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.forward_head(features), model(images))


def test_scores_are_those_that_decide(model: Any, images: Tensor) -> None:
    ((group, scores),) = model.scores(images)
    assert group.index == list(range(5)) and set(scores) == {2, 4}
    layout = model.layout(images)
    covered = (scores[4] < 6.5).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(layout.scale_map == 2, covered)


def test_a_block_with_hooks_sees_one_packed_sequence(model: Any, images: Tensor) -> None:
    shapes = []
    model.blocks[1].register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    run(model, images)
    assert shapes == [(1, model.layout(images).num_tokens, 192)]


def test_a_compiled_model_can_be_pickled(model: Any, images: Tensor) -> None:
    torch.compiler.reset()
    expected = run(model, images)
    model.compile(backend="eager")
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), images), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("keep", [0.6, 1.0])  # equal lengths: the host's own attention call would do
def test_an_attention_backend_that_is_asked_for_is_used(make_host: Host, images: Tensor, keep: float) -> None:
    host = make_host()
    expected = run(aptvit.adapt(host, keep=keep), images)
    assert relative_error(run(aptvit.adapt(host, keep=keep, attention="sdpa"), images), expected) <= 1e-5
    with pytest.raises(ValueError, match="unknown attention backend 'nope'"):
        run(aptvit.adapt(host, keep=keep, attention="nope"), images)  # type: ignore[arg-type]
