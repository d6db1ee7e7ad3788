"""Two passes, against the host's own blocks on the tokens of both at once, where a mask says who sees whom."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import aptvit
from aptvit.calibration.costs import gflops_of_tokens
from aptvit.measuring.operations import count_flops
from aptvit.patching.layout import PatchLayout
from aptvit.patching.layouts import layout_of_images

Host = Callable[..., Any]
EVA: dict[str, Any] = {"patch_size": 16, "dynamic_img_size": True}
WINDOWS: dict[str, Any] = {"window_size": 4, "global_blocks": [1]}


def both_at_once(host: Any, images: Tensor, layout: PatchLayout, **options: Any) -> list[Tensor]:
    """Outputs of each block for the tokens of the layout of one image. (1, 3, H, W) -> (T, D) each"""
    merged = aptvit.adapt(host, resize_only=True, pad=True, **{"scales": 2, "thresholds": 1e9, **options}).eval()
    tokens, coarse = merged.embed(images)
    again, _ = merged.embed(images, layout)
    x, turned, y, turned_again = tokens.x, tokens.rotation, again.x, again.rotation
    prefix, window = layout.num_prefix_tokens, options.get("window_size")

    def places(one: PatchLayout) -> tuple[Tensor, Tensor]:
        """(T, 2) row and column, and (T,) window; of prefix tokens -1."""
        cells = torch.full((one.num_tokens, 2), -1)
        cells[one.patch_index] = torch.stack([one.row, one.col], 1)
        return cells, (cells // window * torch.tensor([1000, 1])).sum(1) if window else cells[:, 0] * 0

    first = torch.ones(coarse.num_tokens, dtype=torch.bool)
    first[coarse.patch_index] = coarse.scale == 1  # not what is left of odd grids
    second = torch.ones(layout.num_tokens, dtype=torch.bool)
    second[layout.patch_index] = layout.scale == 0
    (cells, its_window), (cells_again, window_again) = places(coarse), places(layout)
    stays = (cells[first, None] == cells_again[~second][None]).all(-1)  # (of the first pass, coarse in the layout)
    stays[:prefix] = False
    num, more = int(first.sum()), int(second.sum())
    sees = torch.zeros(num + more, num + more, dtype=torch.bool)
    sees[:num, :num] = True
    sees[num:, num:] = True
    sees[num:, :num] = stays.any(1)
    home = torch.cat([its_window[first], window_again[second]])
    x = torch.cat([x[:, first], y[:, second]], 1)

    def arguments(name: str) -> list[dict[str, Any]]:
        if turned is None or turned_again is None or getattr(turned, name) is None:
            return [{}] * len(host.blocks)
        one, again = getattr(turned, name), getattr(turned_again, name)
        return merged.adapter.block_arguments(torch.cat([one[..., first, :], again[..., second, :]], -2))

    globally, inside = arguments("globally"), arguments("in_windows")
    outs = []
    for number, block in enumerate(merged.adapter.blocks):
        windowed = window and number not in options["global_blocks"]
        mask = sees & (home[:, None] == home) if windowed else sees
        x = block(x, attn_mask=mask[None, None], **(inside if windowed else globally)[number])
        out = y.new_zeros(layout.num_tokens, x.shape[-1])
        out[second] = x[0, num:]
        out[~second] = stays.T.float() @ x[0, :num]
        outs.append(out)
    return outs


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (112, 208)])
@pytest.mark.parametrize(
    ("name", "host_options", "options"),
    [
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, {}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "reg_tokens": 4}, {}),
        ("eva02_tiny_patch14_224", EVA, {}),
        ("eva02_tiny_patch14_224", EVA, WINDOWS),
        ("eva02_tiny_patch14_224", {**EVA, "class_token": False, "global_pool": "avg"}, WINDOWS),
        ("vit_small_patch16_dinov3", {"dynamic_img_size": True}, {}),
    ],
    ids=["vit", "registers", "eva", "windows", "windows alone", "dinov3"],
)
def test_fine_tokens_see_what_the_first_pass_left(
    make_host: Host, name: str, host_options: dict[str, Any], options: dict[str, Any], size: tuple[int, int]
) -> None:
    host = make_host(name, depth=3, **host_options)
    model = aptvit.adapt(host, resize_only=True, scorer="preview", scales=2, keep=0.5, pad=True, **options)
    images = torch.randn(1, 3, *size)
    layout = model.layout(images)
    assert layout.cache is not None and sum(layout.counts[0][1:]) > 0 and layout.counts[0][0] > 0
    expected = both_at_once(host, images, layout, **options)
    features, maps = model.forward_intermediates(images, layout=layout)
    for mine, reference in zip(maps, expected, strict=True):
        torch.testing.assert_close(mine[0], reference[layout.restore_index[0]].movedim(-1, 0), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(features.tokens, host.norm(expected[-1]), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(model(images), model(images, layout))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["images", "windows"])
def test_the_ends_are_the_uniform_and_the_merged_model(make_host: Host, images: Tensor, options: Any) -> None:
    host = make_host("eva02_tiny_patch14_224", depth=3, **EVA, class_token=False, global_pool="avg")
    model = aptvit.adapt(host, scorer="preview", thresholds=1e9, **options)
    merged = aptvit.adapt(host, thresholds=1e9, **options)
    assert model.layout(images).counts[0][0] == 0
    torch.testing.assert_close(model(images), merged(images), atol=1e-5, rtol=1e-5)
    model.thresholds, merged.thresholds = 1e-30, -1.0  # scored, and nothing is so smooth
    assert model.layout(images).is_uniform
    torch.testing.assert_close(model(images), merged(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["images", "windows"])
def test_a_batch_is_its_images(make_host: Host, options: dict[str, Any], bias: float) -> None:
    host = make_host("eva02_tiny_patch14_224", depth=3, **EVA)
    model = aptvit.adapt(host, scorer="preview", thresholds=0.0, pad=True, area_bias=bias, **options)
    pictures = [torch.randn(3, *size) for size in ((128, 128), (96, 200), (128, 128), (16, 16), (16, 300))]
    pictures[2] *= 0.01  # all of it coarse, of the others about a half
    scores = torch.cat([one[2].flatten() for group, one in model.scores(pictures) if 2 not in group.index])
    model.thresholds = float(scores.median())
    layout = model.layout(pictures)
    assert sum(n[1] for n in layout.counts) > 0 and sum(n[0] for n in layout.counts) > 0
    separate = torch.cat([model([one]) for one in pictures])
    torch.testing.assert_close(model(pictures), separate, atol=1e-4, rtol=1e-4)
    # A layout that says only where patches are is as good.
    torch.testing.assert_close(model(pictures, replace(layout, cache=None)), separate, atol=1e-4, rtol=1e-4)
    if not options:
        order = [2, 0]
        again = layout_of_images([(layout, i) for i in order])
        torch.testing.assert_close(model([pictures[i] for i in order], again), separate[order], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_bias_is_of_coarse_keys(make_host: Host) -> None:
    """As log 4 makes a key weigh as much as four, a first pass whose every token is there four times."""
    host = make_host(depth=2, dynamic_img_size=True)
    model = aptvit.adapt(host, resize_only=True, scorer="preview", keep=0.5, area_bias=1.0)
    images = torch.randn(1, 3, 96, 96)
    layout = model.layout(images)
    first = layout.cache
    assert first is not None
    plain = aptvit.adapt(host, resize_only=True, scorer="preview", keep=0.5)
    received: list[Tensor] = []
    for four in (1, 4):
        x = plain.embed(images, layout)[0].x
        fine = torch.ones(layout.num_tokens, dtype=torch.bool)
        fine[layout.patch_index] = layout.scale == 0
        x = x[:, fine]
        rows = first.position[0, layout.row, layout.col][layout.scale > 0].repeat_interleave(four)
        for block, left in zip(plain.adapter.blocks, first.blocks, strict=True):
            ((key, value),) = left.keys_values
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
            k, v = torch.cat([k, key[:, :, rows]], 2), torch.cat([v, value[:, :, rows]], 2)
            out = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + block.attn.proj(out)
            x = x + block.mlp(block.norm2(x))
        received.append(host.norm(x)[0])
    for one, expected in zip((plain, model), received, strict=True):
        features = one.forward_features(images, layout)
        torch.testing.assert_close(features.tokens[fine], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_both_passes_run_in_the_precision_of_the_network(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(depth=3, dynamic_img_size=True), scorer="preview", keep=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        layout = model.layout(images)
        under = model(images, layout)
    assert layout.cache is not None
    assert all(key.dtype == torch.bfloat16 for left in layout.cache.blocks for key, _ in left.keys_values)
    exact = model(images, replace(layout, cache=None))
    assert (under.float() - exact).norm() < 0.05 * exact.norm()


def test_gradients_go_through_both_passes(make_host: Host, images: Tensor) -> None:
    host = make_host("eva02_tiny_patch14_224", depth=3, drop_path_rate=0.0, **EVA)
    model = aptvit.adapt(host, scorer="preview", keep=0.5, **WINDOWS).train()
    layout = model.layout(images[:1])
    assert layout.cache is not None
    assert not any(tensor.requires_grad for tensor in layout.cache.tensors())
    direction = torch.randn(1, model.embed_dim, *layout.scale_map.shape[1:])

    def loss(cells: Tensor | float = 1.0) -> Tensor:
        (out,) = model.forward_intermediates(images[:1], indices=1, intermediates_only=True, layout=layout)
        return (out * direction * cells).sum()

    weights = [p for p in model.blocks.parameters() if p.requires_grad]
    plain = torch.autograd.grad(loss(), weights)
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in plain)
    model.set_grad_checkpointing()
    for one, again in zip(plain, torch.autograd.grad(loss(), weights), strict=True):
        torch.testing.assert_close(one, again)
    # In numbers: a step along the gradient of one weight. What embeds coarse patches is in the first pass alone.
    for weight in (model.blocks[1].mlp.fc2.weight, model.coarse_embed.linear.weight):
        for cells in (layout.scale_map == 0, layout.scale_map > 0):
            (gradient,) = torch.autograd.grad(loss(cells), [weight])
            step = gradient / gradient.norm() * 1e-2
            with torch.no_grad():
                weight += step
            after = loss(cells)
            with torch.no_grad():
                weight -= step
            assert float((after - loss(cells)).detach()) == pytest.approx(float((gradient * step).sum()), rel=0.05)
    model.eval()  # what was left is taken as it is
    (gradient,) = torch.autograd.grad(loss(), [model.coarse_embed.linear.weight])
    assert not gradient.any()


def test_what_chooses_is_what_is_learned(make_host: Host, images: Tensor) -> None:
    host = make_host("eva02_tiny_patch14_224", depth=3, drop_path_rate=0.0, **EVA)
    model = aptvit.adapt(host, scorer="preview", keep=0.5, **WINDOWS).train()
    calls: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    weights = [p for p in model.blocks.parameters() if p.requires_grad]

    def gradients(layout: PatchLayout | None) -> tuple[tuple[Tensor, ...], int]:
        calls.clear()
        loss = model.forward_features(images, layout).tokens.square().sum()
        return torch.autograd.grad(loss, weights), len(calls)

    plain = model.layout(images)
    expected, number = gradients(plain)
    assert number == 2 and plain.cache is not None and not plain.cache.learned
    learned = model.layout(images, learn=True)
    assert learned.cache is not None and learned.cache.learned and torch.equal(plain.scale, learned.scale)
    for layout, times in ((learned, 1), (None, 2)):
        got, number = gradients(layout)
        assert number == times
        for one, its in zip(got, expected, strict=True):
            torch.testing.assert_close(one, its)
    with torch.no_grad():
        assert not model.layout(images, learn=True).cache.learned  # type: ignore[union-attr]
    assert not model.eval().layout(images, learn=True).cache.learned  # type: ignore[union-attr]


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 0.7, 0.4])
def test_its_operations_are_counted(make_host: Host, keep: float) -> None:
    model = aptvit.adapt(make_host(depth=3, dynamic_img_size=True), resize_only=True, scorer="preview", keep=0.5)
    images = torch.randn(1, 3, 128, 128)
    model.keep = keep
    tokens = model.layout(images).num_tokens
    model.reset_classifier(0)
    (expected,) = gflops_of_tokens(model)(np.array([tokens]), 64)
    if keep == 1:  # nothing is scored, but who asks what so many tokens cost is told with scores
        expected -= model.patchifier.scorer.flops([2])(64) / 1e9
    model(images)  # derives values that are kept
    check = count_flops(lambda: model.packed_encoder.derived.check()) / 1e9  # two patches, whatever the image
    assert count_flops(lambda: model(images)) / 1e9 - check == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_compiled_passes_are_the_passes(make_host: Host) -> None:
    """Windows and the whole image, several lengths, gradients too: few graphs, whatever is fine."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    host = make_host("eva02_tiny_patch14_224", depth=3, **EVA)
    results, graphs = [], []
    for compiled in (False, True):
        model = aptvit.adapt(copy.deepcopy(host), scorer="preview", thresholds=0.0, area_bias=0.5, **WINDOWS)
        if compiled:
            model.compile(backend=counter, fullgraph=True)
        for size, quantile in ((128, 0.5), (192, 0.7), (256, 0.3)):
            torch.manual_seed(0)
            images = torch.randn(2, 3, size, size)
            with torch.no_grad():
                scores = model.eval().scores(images)[0][1][2].flatten().sort().values
            rank = int(quantile * len(scores))
            model.thresholds = float(scores[rank : rank + 2].mean())
            tokens = model.train().forward_features(images).tokens
            model.zero_grad()
            tokens.square().sum().backward()
            results.append([tokens.detach(), *(p.grad for p in model.adapter.blocks.parameters())])
            graphs.append(counter.frame_count)
    assert graphs[3] > 0 and len(set(graphs[3:])) == 1
    torch.compiler.reset()
    for got, expected in zip(results[3:], results[:3], strict=True):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_bad_input_is_named(make_host: Host, images: Tensor) -> None:
    host = make_host(depth=4, dynamic_img_size=True)
    for options in ({"scales": 3, "keep": 0.5}, {"thresholds": (1.0, 2.0)}):
        with pytest.raises(ValueError, match="instead of 3 scales"):
            aptvit.adapt(host, scorer="preview", **options)
    model = aptvit.adapt(host, scorer="preview", keep=0.5).eval()
    with pytest.raises(ValueError, match="clips cannot be read in two passes"):
        model.forward_video(images)
    segmenter = aptvit.dense.make_segmenter(model, 3, indices=[0, 1, 2, 3], channels=16, auxiliary_channels=0).eval()
    shallow = aptvit.dense.TransformersBackbone(model, [0, 1])
    assert len(shallow.feature_maps(images)) == 2
    with pytest.raises(ValueError, match="first pass ran 2 blocks"):
        segmenter(images)
