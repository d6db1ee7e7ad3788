from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from torch import Tensor, nn

from aptvit.layers.patch_embed import (
    CoarsePatchEmbed,
    PackedOrder,
    ParameterCache,
    gather_patches,
    resize_weight,
)
from aptvit.layers.position_embed import coarse_rotation
from aptvit.patching.images import group_by_size
from aptvit.patching.patchifier import Patchifier

DIM, CHANNELS, PATCH = 12, 3, 4


def equation_2(patches: Tensor, weight: Tensor, bias: Tensor | None, embed: CoarsePatchEmbed, factor: int) -> Tensor:
    """The paper's Eq. 2 as it is written, patch by patch. patches: (n, C, factor p, factor p) -> (n, D)"""
    p = weight.shape[-1]
    resized = F.interpolate(patches, scale_factor=1 / factor, mode="bilinear", align_corners=False, antialias=False)
    x = F.conv2d(resized, weight, bias, stride=p).flatten(1)
    rows = []
    for a in range(factor):
        row = [
            F.conv2d(patches[:, :, a * p : (a + 1) * p, b * p : (b + 1) * p], weight, bias, stride=p)[..., 0, 0]
            for b in range(factor)
        ]
        rows.append(torch.stack(row, dim=-1))
    grid = torch.stack(rows, dim=-2)  # (n, D, factor, factor)
    while grid.shape[-1] > 1:
        grid = F.conv2d(grid, embed.conv.weight, embed.conv.bias, stride=2)
    return x + grid.flatten(1) @ embed.linear.weight.T + embed.linear.bias


def random_embed(dim: int = DIM, **options: object) -> CoarsePatchEmbed:
    embed = CoarsePatchEmbed(dim, "nonzero", **options)  # type: ignore[arg-type]
    for parameter in embed.parameters():
        nn.init.normal_(parameter, std=0.4)
    return embed


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("has_bias", [True, False])
def test_composed_map_is_equation_2(factor: int, has_bias: bool) -> None:
    weight = torch.randn(DIM, CHANNELS, PATCH, PATCH) * 0.2
    bias = torch.randn(DIM) if has_bias else None
    embed = random_embed()
    patches = torch.randn(5, CHANNELS, factor * PATCH, factor * PATCH)
    composed, offset = embed.compose(weight, bias, factor)
    assert composed.shape == (DIM, CHANNELS * (factor * PATCH) ** 2) and offset is not None
    expected = equation_2(patches, weight, bias, embed, factor)
    error = (F.linear(patches.flatten(1), composed, offset) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_composed_map_of_a_base_patch_is_the_patch_embedding() -> None:
    weight, bias = torch.randn(DIM, CHANNELS, PATCH, PATCH), torch.randn(DIM)
    composed, offset = random_embed().compose(weight, bias, 1)
    assert torch.equal(composed, weight.flatten(1)) and offset is bias
    assert random_embed().compose(weight, None, 1)[1] is None


def test_inits_are_those_of_table_7b() -> None:
    weight, bias = torch.randn(DIM, CHANNELS, PATCH, PATCH), torch.randn(DIM)
    patches = torch.randn(3, CHANNELS, 2 * PATCH, 2 * PATCH)
    resized = F.conv2d(F.interpolate(patches, scale_factor=0.5, mode="bilinear"), weight, bias).flatten(1)
    conv_in = F.conv2d(patches, weight, bias, stride=PATCH)
    for init in ("zero", "residual", "nonzero"):
        embed = CoarsePatchEmbed(DIM, init)
        got = F.linear(patches.flatten(1), *embed.compose(weight, bias, 2))
        branch = embed.conv(conv_in).flatten(1)
        if init == "zero":
            torch.testing.assert_close(got, resized, atol=1e-5, rtol=1e-5)
        elif init == "residual":
            torch.testing.assert_close(got, resized + branch, atol=1e-4, rtol=1e-4)
        else:
            assert embed.linear.weight.std() > 0.01
            assert (got - resized).abs().max() > 0.01
        assert embed.conv.weight.std() > 0.01  # a zero convolution would never learn behind a zero layer
    with pytest.raises(ValueError, match="unknown init 'ones'"):
        CoarsePatchEmbed(DIM, "ones")  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_resized_weight_reads_the_patch_as_bilinear_reduction_does(factor: int) -> None:
    weight = torch.randn(DIM, CHANNELS, PATCH, PATCH)
    patches = torch.randn(4, CHANNELS, factor * PATCH, factor * PATCH)
    small = F.interpolate(patches, size=(PATCH, PATCH), mode="bilinear", align_corners=False, antialias=False)
    expected = F.conv2d(small, weight).flatten(1)
    large = resize_weight(weight, factor)
    assert large.shape == (DIM, CHANNELS, factor * PATCH, factor * PATCH)
    torch.testing.assert_close(F.conv2d(patches, large).flatten(1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [2, 4])
def test_gradients_of_the_composed_map_agree_with_finite_differences(factor: int) -> None:
    embed = random_embed(2, dtype=torch.float64)
    weight = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in embed.named_parameters()]
    assert names == ["conv.weight", "conv.bias", "linear.weight", "linear.bias"]

    class Composed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = embed

        def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.embed.compose(weight, bias, factor)

    def compose(weight: Tensor, bias: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = {f"embed.{name}": p for name, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Composed(), given, (weight, bias))

    inputs = (weight, bias, *(p.detach().requires_grad_() for p in embed.parameters()))
    assert torch.autograd.gradcheck(compose, inputs)
    for grad in torch.autograd.grad(sum(out.square().sum() for out in compose(*inputs)), inputs):
        assert grad.abs().max() > 0


@pytest.mark.parametrize("factor", [2, 4])
def test_gradients_are_those_of_equation_2(factor: int) -> None:
    embed = random_embed()
    weight = (torch.randn(DIM, CHANNELS, PATCH, PATCH) * 0.2).requires_grad_()
    bias = torch.randn(DIM, requires_grad=True)
    patches = torch.randn(5, CHANNELS, factor * PATCH, factor * PATCH)
    direction = torch.randn(5, DIM)
    leaves = [weight, bias, *embed.parameters()]
    composed = (F.linear(patches.flatten(1), *embed.compose(weight, bias, factor)) * direction).sum()
    literal = (equation_2(patches, weight, bias, embed, factor) * direction).sum()
    for got, expected in zip(torch.autograd.grad(composed, leaves), torch.autograd.grad(literal, leaves), strict=True):
        assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


# Which pixels, in which order


@pytest.mark.parametrize("side", [4, 8])
def test_gathered_patches_are_the_slices(side: int) -> None:
    images = torch.rand(3, 2, 20, 28)
    picks = [(0, 0, 0), (2, 1, 2), (1, 20 // side - 1, 28 // side - 1), (0, 1, 0), (2, 0, 1), (0, 0, 0)]
    image, row, col = torch.tensor(picks).unbind(1)
    got = gather_patches(images, image, row, col, side)
    for one, (i, y, x) in zip(got, picks, strict=True):
        assert torch.equal(one, images[i, :, y * side : (y + 1) * side, x * side : (x + 1) * side].flatten())


def test_gathering_nothing_gives_no_rows() -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    assert gather_patches(torch.rand(1, 3, 16, 16), nothing, nothing, nothing, 8).shape == (0, 192)
    assert gather_patches(torch.rand(1, 3, 8, 8), nothing, nothing, nothing, 16).shape == (0, 768)  # none fits


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("prefix", [0, 3])
def test_rows_made_scale_by_scale_reach_their_place_in_the_packed_sequence(mixed: bool, prefix: int) -> None:
    """Every row carries (image, top, left, side); the packed sequence must read as the layout lists its patches."""
    images = torch.rand(4, 3, 64, 96)
    images[:, :, :32] *= torch.linspace(0, 0.02, 4).view(4, 1, 1, 1)
    images[:, :, 32:48, :16] = 0.5
    batch = [images[0], images[1][:, :48, :32], images[2], images[3][:, :48, :32]] if mixed else images
    patchifier = Patchifier(8, thresholds=(3.0, 3.0), num_prefix_tokens=prefix)
    groups = group_by_size(batch, 3, 8)
    assert len(groups) == 1 + mixed
    layout = patchifier.layout(groups)
    assert all(sum(n) for n in zip(*layout.counts, strict=True))  # every scale occurs
    order = PackedOrder(layout, groups)
    rows = [[-1, -1, -1, number] for number in range(prefix)]
    for scale in range(3):
        for group, (local, row, col) in zip(groups, order.selections(scale), strict=True):
            side = 8 << scale
            for i, y, x in zip(local.tolist(), row.tolist(), col.tolist(), strict=True):
                rows.append([group.index[i], y * side, x * side, side])
    packed = [rows[source] for source in order.source_of_row().tolist()]
    expected: list[list[int]] = []
    for image in range(4):
        expected += [[-1, -1, -1, number] for number in range(prefix)]
        expected += [[image, *patch] for patch in layout.patches(image).tolist()]
    assert packed == expected


# Rotary embedding at the centres of coarse patches


def centres(count: int, factor: int) -> np.ndarray:
    """Positions, in base patches, of the centres of whole coarse patches along one side."""
    return np.arange(count // factor) * factor + (factor - 1) / 2


def angles_axial(y: np.ndarray, x: np.ndarray, bands: np.ndarray) -> np.ndarray:
    """(h, w, 2 bands): angles of rows, then of columns."""
    yy, xx = np.meshgrid(y, x, indexing="ij")
    return np.concatenate([yy[..., None] * bands, xx[..., None] * bands], axis=-1)


def sines_and_cosines(angles: np.ndarray, half: bool) -> np.ndarray:
    spread = np.concatenate([angles, angles], -1) if half else np.repeat(angles, 2, axis=-1)
    return np.concatenate([np.sin(spread), np.cos(spread)], -1).reshape(-1, 2 * spread.shape[-1])


GRIDS = [(8, 8), (8, 12), (9, 7), (16, 6)]


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("ref", "offset", "indexing"), [((16, 16), 0.0, "ij"), (None, 1.0, "xy"), (None, 0.0, "ij")])
def test_axial_rotation_at_centres(
    grid: tuple[int, int], factor: int, ref: tuple[int, int] | None, offset: float, indexing: str
) -> None:
    rope = RotaryEmbeddingCat(
        32, in_pixels=False, ref_feat_shape=ref, grid_offset=offset, grid_indexing=indexing, temperature=10000.0
    )
    bands = 1 / 10000.0 ** (np.arange(8) / 8)
    y, x = centres(grid[0], factor) + offset, centres(grid[1], factor) + offset
    if ref is not None:
        y, x = y / grid[0] * ref[0], x / grid[1] * ref[1]
    angles = angles_axial(y, x, bands)
    if indexing == "xy":
        angles = np.concatenate([angles[..., 8:], angles[..., :8]], -1)
    got = coarse_rotation(rope.get_embed(grid), grid, factor)
    np.testing.assert_allclose(got.numpy(), sines_and_cosines(angles, half=False), atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_dinov3_rotation_at_centres(grid: tuple[int, int], factor: int) -> None:
    rope = RotaryEmbeddingDinoV3(32, temperature=100.0)
    frequencies = 2 * math.pi / 100.0 ** (2 * np.arange(8) / 16)
    y = 2 * (centres(grid[0], factor) + 0.5) / grid[0] - 1
    x = 2 * (centres(grid[1], factor) + 0.5) / grid[1] - 1
    expected = sines_and_cosines(angles_axial(y, x, frequencies), half=True)
    np.testing.assert_allclose(coarse_rotation(rope.get_embed(grid), grid, factor).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_mixed_rotation_at_centres(grid: tuple[int, int], factor: int) -> None:
    rope = RotaryEmbeddingMixed(32, depth=2, num_heads=2, feat_shape=list(grid), grid_indexing="xy")
    got = coarse_rotation(rope.get_embed(), grid, factor).detach()
    x_freqs, y_freqs = rope.freqs.detach().double().numpy()  # (depth, heads, 8)
    yy, xx = np.meshgrid(centres(grid[0], factor), centres(grid[1], factor), indexing="ij")
    assert got.shape == (2, 2, yy.size, 32)
    for block in range(2):
        for head in range(2):
            angles = xx[..., None] * x_freqs[block, head] + yy[..., None] * y_freqs[block, head]
            expected = sines_and_cosines(angles, half=False)
            np.testing.assert_allclose(got[block, head].numpy(), expected, atol=1e-5)


def test_rotation_keeps_precision_and_gradients() -> None:
    rope = RotaryEmbeddingMixed(32, depth=1, num_heads=2, feat_shape=[8, 8])
    coarse_rotation(rope.get_embed(), (8, 8), 2).square().sum().backward()
    assert rope.freqs.grad is not None and rope.freqs.grad.isfinite().all()
    half = coarse_rotation(rope.get_embed().bfloat16(), (8, 8), 2)
    assert half.dtype == torch.bfloat16


# Values kept between calls


class Counted:
    """A computation that counts its calls."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute, self.calls = compute, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.compute()


def test_cache_keeps_a_value_while_nothing_changes() -> None:
    parameter, cache = nn.Parameter(torch.ones(3)), ParameterCache()
    double = Counted(lambda: parameter * 2)
    with torch.no_grad():
        first, second = cache.get("a", [parameter], double), cache.get("a", [parameter], double)
        assert first is second and double.calls == 1
        cache.get("b", [parameter], double)
        assert double.calls == 2  # keys are kept apart
        cache.clear()
        cache.get("a", [parameter], double)
        assert double.calls == 3
    with torch.inference_mode():
        cache.get("a", [parameter], double)
        assert double.calls == 3


def test_cache_is_not_used_with_gradients_on() -> None:
    parameter, cache = nn.Parameter(torch.ones(3)), ParameterCache()
    with torch.no_grad():
        cache.get("a", [parameter], lambda: parameter * 2)
    value = cache.get("a", [parameter], lambda: parameter * 2)
    assert value.requires_grad
    value.sum().backward()
    assert torch.equal(parameter.grad, torch.full((3,), 2.0))
    with torch.no_grad():
        assert not cache.get("a", [parameter], lambda: parameter * 2).requires_grad


def step_with(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[nn.Module], None]:
    def step(module: nn.Module) -> None:
        with torch.enable_grad():
            sum(p.square().sum() for p in module.parameters()).backward()  # type: ignore[union-attr]
        optimizer(module.parameters(), lr=0.1).step()

    return step


def fill(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.fill_(7)  # type: ignore[union-attr, operator]


def replace(module: nn.Module) -> None:
    module.weight = nn.Parameter(torch.full((2, 3), 7.0))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": fill,
    "SGD": step_with(torch.optim.SGD),
    "AdamW": step_with(torch.optim.AdamW),
    "load_state_dict": lambda m: m.load_state_dict({"weight": torch.full((2, 3), 7.0), "bias": torch.zeros(2)}),
    "load_state_dict(assign)": lambda m: m.load_state_dict(
        {"weight": torch.full((2, 3), 7.0), "bias": torch.zeros(2)}, assign=True
    ),
    "another parameter": replace,
    "initialisation": lambda m: nn.init.constant_(m.weight, 7.0),  # type: ignore[arg-type]
    "to another precision": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cache_is_refreshed_after_a_change(change: str) -> None:
    module, cache = nn.Linear(3, 2), ParameterCache()

    def value() -> Tensor:
        with torch.no_grad():
            return cache.get("a", list(module.parameters()), lambda: module.weight * 2)

    before = value()
    assert value() is before
    CHANGES[change](module)
    after = value()
    assert torch.equal(after, module.weight.detach() * 2) and after.dtype == module.weight.dtype
    assert not torch.equal(after.float(), before) or change == "to another precision"


def test_copies_of_a_cache_start_empty() -> None:
    parameter, cache = nn.Parameter(torch.ones(3)), ParameterCache()
    with torch.no_grad():
        cache.get("a", [parameter], lambda: parameter * 2)
        double = Counted(lambda: parameter * 2)
        copy.deepcopy(cache).get("a", [parameter], double)
    assert double.calls == 1


def test_cache_keeps_a_bounded_number_of_values() -> None:
    cache, parameter = ParameterCache(capacity=2), torch.zeros(1)
    computed: list[int] = []

    def value(key: int) -> int:
        return cache.get(key, [parameter], lambda: computed.append(key) or key)  # type: ignore[func-returns-value]

    with torch.no_grad():
        assert [value(key) for key in (1, 2, 2, 3, 2, 1)] == [1, 2, 2, 3, 2, 1]
    assert computed == [1, 2, 3, 1]


def test_the_oldest_value_makes_room() -> None:
    parameter, cache = nn.Parameter(torch.ones(3)), ParameterCache(capacity=2)
    double = Counted(lambda: parameter * 2)
    with torch.no_grad():
        for key in ("a", "b", "c"):
            cache.get(key, [parameter], double)
        for key, calls in (("c", 3), ("b", 3), ("a", 4)):
            cache.get(key, [parameter], double)
            assert double.calls == calls
