"""Pixels of the chosen patches to embeddings (Eq. 2 of the paper).

    x_P = E(resize(P)) + linear(conv^i({E(P_j)}))

E is the host's own patch embedding, the P_j are the base patches inside the coarse patch P of 2^i x 2^i, and linear is
initialised with zeros. `embed_directly` computes just that, by calling the modules, and so does training. Nothing in it
is non-linear, so for inference `AffineMaps` finds the one weight of shape (D, C (2^i p)^2) and bias that all of it
amounts to, again by calling the modules, whatever they are: adapters, parametrisations, tied or quantised weights.

    chosen patches of scale i ── gather ──> (n_i, C (2^i p)^2) ── W_i, b_i ──> (n_i, D)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.layers.kernels.gather_torch import gather_patches
from aptvit.patching.images import ImageGroup, Normalization
from aptvit.patching.kernels import has_triton
from aptvit.patching.layout import PatchLayout

__all__ = ["AffineMaps", "CoarsePatchEmbed", "Init", "PatchOrder", "PatchReader", "embed_directly", "patch_reader"]

Init = Literal["zero", "residual", "nonzero"]
COARSE_PREFIX = "coarse_embed"  # the name of a model's `CoarsePatchEmbed`
Embed = Callable[[Tensor], Tensor]  # (n, C, h p, w p) -> (n, D, h, w): the host's patch embedding
Selection = tuple[Tensor, Tensor, Tensor]  # (n,) image, row and column of patches, in patches of their scale
PatchReader = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # a selection and a side in pixels -> (n, C side^2)


class CoarsePatchEmbed(nn.Module):
    """The new parameters: how the base patches inside a coarse patch add to its resized embedding (Eq. 2).

    One 2x2 convolution, applied i times at scale i, and one linear layer, both shared by all scales.

    Args:
        dim: Width of the host.
        init: How the linear layer starts (Table 7b): ``zero`` leaves the resized embedding alone, ``residual`` adds
            the convolution's output as it is, ``nonzero`` has the usual random start.
        device: Of the parameters.
        dtype: Likewise.

    Raises:
        ValueError: If there is no such start.
    """

    def __init__(
        self,
        dim: int,
        init: Init = "zero",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=2, stride=2, device=device, dtype=dtype)
        self.linear = nn.Linear(dim, dim, device=device, dtype=dtype)
        if init == "zero":
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        elif init == "residual":
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        elif init != "nonzero":
            raise ValueError(f"unknown init {init!r}: use 'zero', 'residual' or 'nonzero'")

    def forward(self, cells: Tensor) -> Tensor:
        """Embeddings of the base patches in n coarse patches. (n, D, 2^i, 2^i) -> (n, D)"""
        for _ in range(cells.shape[-1].bit_length() - 1):
            cells = self.conv(cells)
        return self.linear(cells.flatten(1))


def reduce_images(images: Tensor, factor: int) -> Tensor:
    """Bilinear reduction by an even factor without antialiasing: the mean of the central 2x2 pixels of each block.

    (b, C, H, W) -> (b, C, H // factor, W // factor)
    """
    rows, cols = images.shape[2] // factor, images.shape[3] // factor
    blocks = images[:, :, : rows * factor, : cols * factor].unflatten(3, (cols, factor)).unflatten(2, (rows, factor))
    middle = slice(factor // 2 - 1, factor // 2 + 1)
    return blocks[:, :, :, middle, :, middle].mean((3, 5))


def embed_directly(
    embed: Embed, coarse: nn.Module | None, images: Tensor, selections: Sequence[Selection]
) -> list[Tensor]:
    """Equation 2 as it is written, by calling the modules.

    Args:
        embed: The host's patch embedding E.
        coarse: `CoarsePatchEmbed`; None for patches that are only resized.
        images: (b, C, H, W) as the host reads them.
        selections: For each scale its patches.

    Returns:
        For each scale (n_i, D).
    """
    image, row, col = selections[0]
    # (b, D, h, w): each base cell is a token, or part of one; where it is neither, no image is needed
    cells = embed(images if coarse is not None or len(image) else images[:0])
    rows = [cells[image, :, row, col]]
    for scale, (image, row, col) in enumerate(selections[1:], start=1):
        factor = 1 << scale
        height, width = (side // factor for side in cells.shape[2:])
        if not height * width:  # no such patch fits
            rows.append(cells.flatten(2)[image, :, row])
            continue
        embedded = embed(reduce_images(images, factor))[image, :, row, col]
        if coarse is not None:
            # (b, D, h, f, w, f) -> (b, h, w, D, f, f): a view; only the chosen patches are copied
            blocks = cells[:, :, : height * factor, : width * factor]
            blocks = blocks.unflatten(3, (width, factor)).unflatten(2, (height, factor)).permute(0, 2, 4, 1, 3, 5)
            embedded = embedded + coarse(blocks[image, row, col])
        rows.append(embedded)
    return rows


class AffineMaps:
    """The one affine map that Eq. 2 is at each scale, found by calling the modules on unit patches.

    Args:
        embed: The host's patch embedding.
        coarse: `CoarsePatchEmbed`, or None.
        black: (1, C, p, p) a patch of zeros, as the host reads it.
    """

    def __init__(self, embed: Embed, coarse: nn.Module | None, black: Tensor) -> None:
        self._coarse: Any = coarse
        # Brightness of unit patches: a power of two, so large that a bias does not round the weights away.
        self._unit = 2.0**12 if black.dtype == torch.float16 else 2.0**20
        with torch.autocast(black.device.type, enabled=False):
            units = torch.eye(black.numel(), device=black.device, dtype=black.dtype).mul_(self._unit)
            self.bias = embed(black)[0, :, 0, 0]  # (D,)
            rows = (embed(units.unflatten(1, black.shape[1:]))[:, :, 0, 0] - self.bias) / self._unit  # (C p^2, D)
        self.weight = rows.T.unflatten(1, black.shape[1:])  # (D, C, p, p)
        self._scales: dict[int, tuple[Tensor, Tensor]] = {0: (self.weight.flatten(1).contiguous(), self.bias)}

    def embed(self, read: PatchReader, selections: Sequence[Selection]) -> list[Tensor]:
        """As `embed_directly`, by one product for each scale.

        Args:
            read: Cuts patches out of the images, from `patch_reader`.
            selections: For each scale its patches.
        """
        side = self.weight.shape[-1]
        patches = (read(*selection, side << scale) for scale, selection in enumerate(selections))
        return [F.linear(rows, *self.of_scale(scale)) for scale, rows in enumerate(patches)]

    def of_scale(self, scale: int) -> tuple[Tensor, Tensor]:
        """Weight (D, C (2^scale p)^2) and bias (D,); kept. Threads that find one at once find the same."""
        if scale not in self._scales:
            with torch.autocast(self.bias.device.type, enabled=False):
                self._scales[scale] = self._compose(scale)
        return self._scales[scale]

    def _compose(self, scale: int) -> tuple[Tensor, Tensor]:
        weight, bias = resize_weight(self.weight, 1 << scale).flatten(1), self.bias
        if self._coarse is None:
            return weight, bias
        parts, offset = self.weight, self.bias  # of conv^i({E(P_j)}): (D, C, 2^i p, 2^i p) and (D,)
        for _ in range(scale):
            parts, offset = self._convolved(parts, offset)
        linear = self._coarse.linear
        zero = linear(torch.zeros_like(bias)[None])
        branch = (linear(parts.flatten(1).T * self._unit) - zero) / self._unit  # (C (2^i p)^2, D)
        return weight + branch.T, bias + linear(offset[None])[0]

    def _convolved(self, parts: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The map of 2x2 neighbours of a map. (D, C, s, s) -> (D, C, 2 s, 2 s), and the bias."""
        conv, (channels, side) = self._coarse.conv, parts.shape[1:3]
        rows = parts.flatten(1).T * self._unit  # (C s^2, D)
        cells = rows.new_zeros(*rows.shape, 2, 2)
        zero = conv(cells[:1])[:, :, 0, 0]
        grown = parts.new_zeros(parts.shape[0], channels, 2, side, 2, side)
        for i in (0, 1):
            for j in (0, 1):
                cells.zero_()[:, :, i, j] = rows
                grown[:, :, i, :, j] = ((conv(cells)[:, :, 0, 0] - zero) / self._unit).T.unflatten(
                    1, (channels, side, side)
                )
        constant = offset[None, :, None, None].expand(1, -1, 2, 2)
        return grown.flatten(4, 5).flatten(2, 3), conv(constant)[0, :, 0, 0]


def resize_weight(weight: Tensor, factor: int) -> Tensor:
    """The patch embedding of a patch after `reduce_images`, as a map of the patch's own pixels.

    (D, C, p, p) -> (D, C, factor p, factor p)
    """
    if factor == 1:
        return weight
    kernel = weight.new_zeros(factor)
    kernel[factor // 2 - 1 : factor // 2 + 1] = 0.5
    # (D, C, p, 1, p, 1) * (f, 1, f) -> (D, C, p, f, p, f) -> (D, C, p f, p f)
    enlarged = weight[:, :, :, None, :, None] * (kernel[:, None, None] * kernel)
    return enlarged.flatten(4, 5).flatten(2, 3)


def patch_reader(images: Tensor, normalization: Normalization, dtype: torch.dtype) -> PatchReader:
    """`gather_patches` of images as a model reads them: normalised, and of its type.

    Args:
        images: (b, C, H, W).
        normalization: Of raw images.
        dtype: Of the model.
    """
    if images.is_cuda and has_triton() and not images.requires_grad:
        from aptvit.layers.kernels import gather_triton

        mean, std = normalization.mean, normalization.std
        return partial(gather_triton.gather_patches, images, mean=mean, std=std, dtype=dtype)
    return partial(gather_patches, normalization.normalised(images).to(dtype))


class PatchOrder:
    """From patches sorted by scale and group, as they are embedded, to the order of the packed sequence.

    Args:
        layout: The layout of the whole batch.
        groups: Its images by size.
    """

    def __init__(self, layout: PatchLayout, groups: Sequence[ImageGroup]) -> None:
        self.layout, self.num_groups = layout, len(groups)
        device, key, image = layout.image.device, layout.scale, layout.image
        if len(groups) > 1:
            table = torch.zeros(2, layout.num_images, dtype=torch.long)  # group, and place in it, of each image
            for number, group in enumerate(groups):
                table[0, group.index], table[1, group.index] = number, torch.arange(len(group.index))
            number_of, image = table.to(device, non_blocking=True)[:, layout.image]
            key = key * len(groups) + number_of
        order = key.argsort(stable=True)
        columns = torch.stack([image, layout.row >> layout.scale, layout.col >> layout.scale, key])
        *_, self.key = self._columns = columns.index_select(1, order)  # (4, N)
        self.cells = self._columns[1:3]  # (2, N) row and column of each patch, in patches of its scale
        self._sizes = [
            sum(layout.counts[i][scale] for i in group.index) for scale in range(layout.num_scales) for group in groups
        ]
        # (T,) for each row of the packed sequence its place in [prefix tokens, sorted patches]
        prefix = layout.num_prefix_tokens
        self.source = torch.zeros(layout.num_tokens, dtype=torch.long, device=device)
        self.source[layout.patch_index[order]] = torch.arange(prefix, prefix + layout.num_patches, device=device)
        if prefix > 1:
            front = torch.arange(prefix, device=device)
            self.source[layout.cu_seqlens[:-1, None].long() + front] = front

    def selections(self) -> list[list[Selection]]:
        """For each group and scale: (n,) image within the group, row and column in patches of this scale."""
        pieces: list[Any] = [part.unbind(0) for part in self._columns[:3].split(self._sizes, dim=1)]
        return [pieces[group :: self.num_groups] for group in range(self.num_groups)]

    def packed(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """(P, ...) of prefix tokens and (N, ...) of sorted patches -> (T, ...) of packed tokens."""
        return torch.cat([prefix, patches]).index_select(0, self.source)
