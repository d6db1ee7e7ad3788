from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from torch import Tensor, nn

from aptvit.layers.kernels.gather_torch import gather_patches
from aptvit.layers.patch_embed import AffineMaps, CoarsePatchEmbed, PatchOrder, embed_directly, resize_weight
from aptvit.layers.rotary import centre_rotation
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


def maps_of(weight: Tensor, bias: Tensor | None, embed: nn.Module | None) -> AffineMaps:
    with torch.no_grad():
        return AffineMaps(
            partial(F.conv2d, weight=weight, bias=bias, stride=PATCH), embed, weight.new_zeros(1, *weight.shape[1:])
        )


def directly(patches: Tensor, weight: Tensor, bias: Tensor | None, embed: nn.Module | None, factor: int) -> Tensor:
    """`embed_directly` of whole coarse patches. (n, C, factor p, factor p) -> (n, D)"""
    chosen = torch.arange(len(patches))
    none = chosen[:0]
    selections = [(none, none, none)] * (factor.bit_length() - 1) + [(chosen, chosen * 0, chosen * 0)]
    return embed_directly(
        partial(F.conv2d, weight=weight, bias=bias, stride=weight.shape[-1]), embed, patches, selections
    )[-1]


def random_embed(dim: int = DIM, **options: object) -> CoarsePatchEmbed:
    embed = CoarsePatchEmbed(dim, "nonzero", **options)  # type: ignore[arg-type]
    for parameter in embed.parameters():
        nn.init.normal_(parameter, std=0.4)
    return embed


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("has_bias", [True, False])
def test_both_ways_are_equation_2(factor: int, has_bias: bool) -> None:
    weight = torch.randn(DIM, CHANNELS, PATCH, PATCH) * 0.2
    bias = torch.randn(DIM) if has_bias else None
    embed = random_embed()
    patches = torch.randn(5, CHANNELS, factor * PATCH, factor * PATCH)
    composed, offset = maps_of(weight, bias, embed).of_scale(factor.bit_length() - 1)
    assert composed.shape == (DIM, CHANNELS * (factor * PATCH) ** 2)
    expected = equation_2(patches, weight, bias, embed, factor)
    for got in (F.linear(patches.flatten(1), composed, offset), directly(patches, weight, bias, embed, factor)):
        assert (got - expected).abs().max() / expected.abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_map_of_a_base_patch_is_the_patch_embedding_itself(dtype: torch.dtype) -> None:
    """Unit patches are so bright that a bias does not round the weights away."""
    weight, bias = (torch.randn(DIM, CHANNELS, PATCH, PATCH) * 0.02).to(dtype), torch.randn(DIM).to(dtype)
    composed, offset = maps_of(weight, bias, random_embed(dtype=dtype)).of_scale(0)
    torch.testing.assert_close(composed, weight.flatten(1), atol=1e-4 * float(weight.std()), rtol=0)
    assert torch.equal(offset, bias)


@torch.no_grad()
def test_inits_are_those_of_table_7b() -> None:
    weight, bias = torch.randn(DIM, CHANNELS, PATCH, PATCH), torch.randn(DIM)
    patches = torch.randn(3, CHANNELS, 2 * PATCH, 2 * PATCH)
    resized = F.conv2d(F.interpolate(patches, scale_factor=0.5, mode="bilinear"), weight, bias).flatten(1)
    conv_in = F.conv2d(patches, weight, bias, stride=PATCH)
    for init in ("zero", "residual", "nonzero"):
        torch.manual_seed(0)
        embed = CoarsePatchEmbed(DIM, init)
        torch.manual_seed(0)
        usual = [nn.Conv2d(DIM, DIM, kernel_size=2), nn.Linear(DIM, DIM)]
        branch = embed.conv(conv_in).flatten(1)
        composed = F.linear(patches.flatten(1), *maps_of(weight, bias, embed).of_scale(1))
        for got in (composed, directly(patches, weight, bias, embed, 2)):
            if init == "zero":
                torch.testing.assert_close(got, resized, atol=1e-5, rtol=1e-5)
            elif init == "residual":
                torch.testing.assert_close(got, resized + branch, atol=1e-4, rtol=1e-4)
            else:
                torch.testing.assert_close(got, resized + usual[1](branch), atol=1e-4, rtol=1e-4)
        # a zero convolution would never learn behind a zero layer
        assert torch.equal(embed.conv.weight, usual[0].weight) and torch.equal(embed.conv.bias, usual[0].bias)
    with pytest.raises(ValueError, match="unknown init 'ones'"):
        CoarsePatchEmbed(DIM, "ones")  # type: ignore[arg-type]


@torch.no_grad()
def test_patches_that_are_only_resized() -> None:
    weight, patches = torch.randn(DIM, CHANNELS, PATCH, PATCH), torch.randn(3, CHANNELS, 4 * PATCH, 4 * PATCH)
    expected = F.conv2d(F.interpolate(patches, scale_factor=0.25, mode="bilinear"), weight).flatten(1)
    composed = F.linear(patches.flatten(1), *maps_of(weight, None, None).of_scale(2))
    for got in (composed, directly(patches, weight, None, None, 4)):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


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
def test_gradients_agree_with_finite_differences(factor: int) -> None:
    embed = random_embed(2, dtype=torch.float64)
    weight = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    patches = torch.randn(2, 1, 2 * factor, 2 * factor, dtype=torch.float64)
    names = [name for name, _ in embed.named_parameters()]
    assert names == ["conv.weight", "conv.bias", "linear.weight", "linear.bias"]

    def rows(weight: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))

        class Coarse(nn.Module):
            def forward(self, cells: Tensor) -> Tensor:
                return torch.func.functional_call(embed, state, (cells,))

        return directly(patches, weight, bias, Coarse(), factor)

    inputs = (weight, bias, *(p.detach().requires_grad_() for p in embed.parameters()))
    assert torch.autograd.gradcheck(rows, inputs)
    for grad in torch.autograd.grad(rows(*inputs).square().sum(), inputs):
        assert grad.abs().max() > 0


@pytest.mark.parametrize("factor", [2, 4])
def test_gradients_are_those_of_equation_2(factor: int) -> None:
    embed = random_embed()
    weight = (torch.randn(DIM, CHANNELS, PATCH, PATCH) * 0.2).requires_grad_()
    bias = torch.randn(DIM, requires_grad=True)
    patches = torch.randn(5, CHANNELS, factor * PATCH, factor * PATCH)
    direction = torch.randn(5, DIM)
    leaves = [weight, bias, *embed.parameters()]
    mine = (directly(patches, weight, bias, embed, factor) * direction).sum()
    literal = (equation_2(patches, weight, bias, embed, factor) * direction).sum()
    for got, expected in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(literal, leaves), strict=True):
        assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_each_parameter_has_a_gradient_where_no_patch_is_coarse() -> None:
    """As processes that train together need it, in images too small for a coarse patch too."""
    for size in (2 * PATCH, PATCH):
        embed, weight = random_embed(), torch.randn(DIM, CHANNELS, PATCH, PATCH, requires_grad=True)
        image, row, col = torch.tensor([[0], [size // PATCH - 1], [0]])
        selections = [(image, row, col), (image[:0], row[:0], col[:0])]
        images = torch.randn(1, CHANNELS, size, size)
        rows = embed_directly(partial(F.conv2d, weight=weight, stride=PATCH), embed, images, selections)
        patch = images[0, :, size - PATCH :, :PATCH]
        torch.testing.assert_close(torch.cat(rows), (weight * patch).sum((1, 2, 3))[None])
        direction = torch.randn(DIM)
        (torch.cat(rows) * direction).sum().backward()
        torch.testing.assert_close(weight.grad, direction[:, None, None, None] * patch)
        if size == 2 * PATCH:
            assert all(p.grad is not None and not p.grad.any() for p in embed.parameters())


# Which pixels, in which order


@pytest.mark.parametrize("side", [4, 8])
def test_gathered_patches_are_the_slices(side: int) -> None:
    images = torch.rand(3, 2, 20, 28)
    picks = [(0, 0, 0), (2, 1, 2), (1, 20 // side - 1, 28 // side - 1), (0, 1, 0), (2, 0, 1), (0, 0, 0)]
    image, row, col = torch.tensor(picks).unbind(1)
    got = gather_patches(images, image, row, col, side)
    for one, (i, y, x) in zip(got, picks, strict=True):
        assert torch.equal(one, images[i, :, y * side : (y + 1) * side, x * side : (x + 1) * side].flatten())


@torch.no_grad()
def test_nothing_gathered_stands_between_rows_as_nothing() -> None:
    """Rows of several groups are joined, and a group may have none of a size, or be too small for it."""
    images, small = torch.rand(2, 3, 16, 24), torch.rand(1, 3, 8, 8)
    nothing = torch.zeros(0, dtype=torch.long)
    image, row, col = torch.tensor([[1, 0], [1, 0], [2, 1]])
    some = gather_patches(images, image, row, col, 8)
    for other, side in ((images, 8), (small, 16)):
        none = gather_patches(other, nothing, nothing, nothing, side)
        weight = torch.randn(DIM, 3 * side**2)
        assert torch.equal(F.linear(none, weight), torch.zeros(0, DIM))  # each row has as many pixels as any other
    joined = torch.cat([gather_patches(images, nothing, nothing, nothing, 8), some])
    assert torch.equal(joined, torch.stack([images[1, :, 8:, 16:].flatten(), images[0, :, :8, 8:16].flatten()]))


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
    layout = patchifier(groups)
    assert all(sum(n) for n in zip(*layout.counts, strict=True))  # every scale occurs
    order = PatchOrder(layout, groups)
    selections = order.selections()
    rows = [[-1, -1, -1, number] for number in range(prefix)]
    for scale in range(3):
        for group, (local, row, col) in zip(groups, (of_group[scale] for of_group in selections), strict=True):
            side = 8 << scale
            for i, y, x in zip(local.tolist(), row.tolist(), col.tolist(), strict=True):
                rows.append([group.index[i], y * side, x * side, side])
    packed = [rows[source] for source in order.source.tolist()]
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
    got = centre_rotation(rope.get_embed(grid), grid, factor)
    np.testing.assert_allclose(got.numpy(), sines_and_cosines(angles, half=False), atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_dinov3_rotation_at_centres(grid: tuple[int, int], factor: int) -> None:
    rope = RotaryEmbeddingDinoV3(32, temperature=100.0)
    frequencies = 2 * math.pi / 100.0 ** (2 * np.arange(8) / 16)
    y = 2 * (centres(grid[0], factor) + 0.5) / grid[0] - 1
    x = 2 * (centres(grid[1], factor) + 0.5) / grid[1] - 1
    expected = sines_and_cosines(angles_axial(y, x, frequencies), half=True)
    np.testing.assert_allclose(centre_rotation(rope.get_embed(grid), grid, factor).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_mixed_rotation_at_centres(grid: tuple[int, int], factor: int) -> None:
    rope = RotaryEmbeddingMixed(32, depth=2, num_heads=2, feat_shape=list(grid), grid_indexing="xy")
    got = centre_rotation(rope.get_embed(), grid, factor).detach()
    x_freqs, y_freqs = rope.freqs.detach().double().numpy()  # (depth, heads, 8)
    yy, xx = np.meshgrid(centres(grid[0], factor), centres(grid[1], factor), indexing="ij")
    assert got.shape == (2, 2, yy.size, 32)
    for block in range(2):
        for head in range(2):
            angles = xx[..., None] * x_freqs[block, head] + yy[..., None] * y_freqs[block, head]
            expected = sines_and_cosines(angles, half=False)
            np.testing.assert_allclose(got[block, head].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 4])
def test_gradients_reach_learned_frequencies(factor: int) -> None:
    """Those of sines and cosines of the angles at the centres, written down."""
    rope = RotaryEmbeddingMixed(32, depth=1, num_heads=2, feat_shape=[8, 12], grid_indexing="xy")
    y, x = (torch.from_numpy(centres(count, factor)).float() for count in (8, 12))
    yy, xx = (grid.flatten()[:, None] for grid in torch.meshgrid(y, x, indexing="ij"))  # (n, 1)
    angles = (xx * rope.freqs[0, ..., None, :] + yy * rope.freqs[1, ..., None, :]).repeat_interleave(2, dim=-1)
    expected = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (1, heads, n, 32)
    direction = torch.randn(expected.shape)
    (grad,) = torch.autograd.grad((expected * direction).sum(), rope.freqs)
    (got,) = torch.autograd.grad((centre_rotation(rope.get_embed(), (8, 12), factor) * direction).sum(), rope.freqs)
    assert grad.abs().max() > 1
    torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("factor", [2, 4])
def test_half_precision_is_rounded_once(factor: int) -> None:
    """Of sines and cosines in half precision, the direction of the four in the middle, by numpy in float64."""
    rope = RotaryEmbeddingMixed(32, depth=1, num_heads=2, feat_shape=[8, 8])
    half = rope.get_embed().detach().bfloat16()  # (1, heads, 64, 32)
    got = centre_rotation(half, (8, 8), factor)
    cells = half.double().numpy().reshape(2, 8, 8, 32)
    if factor > 1:
        middle = np.arange(factor // 2 - 1, 8, factor)
        cells = sum(cells[:, middle + i][:, :, middle + j] for i in (0, 1) for j in (0, 1))
        length = np.hypot(cells[..., :16], cells[..., 16:])
        cells = cells / np.concatenate([length, length], -1)
    expected = torch.from_numpy(cells.reshape(1, 2, -1, 32)).to(torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert (got != expected).float().mean() < 1e-3  # float32 in between, where a tie would be rounded the other way
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)
