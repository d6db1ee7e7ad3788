"""Embeddings of patches of several sizes (Eq. 2 of the paper).

    x_P = E(resize(P)) + linear(conv^i({E(P_j)}))

E is the host's own patch embedding, the P_j are the base patches inside the coarse patch P of 2^i x 2^i, and linear is
initialised with zeros. `embed_directly` computes this by calling the modules, also in training. The whole map is
affine, so for inference `AffineMaps` finds the equivalent weight (D, C (2^i p)^2) and bias (D,) of each scale, again by
calling the modules. This includes adapters, parametrisations, tied and quantised weights.

    patches of scale i ── gather ──> (n_i, C (2^i p)^2) ── W_i, b_i ──> (n_i, D)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
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
    """The sub-patch branch of Eq. 2, the only new parameters: base patches inside a coarse patch to an embedding.

    One 2x2 convolution, applied i times at scale i, and one linear layer, both shared by all scales.

    Args:
        dim: Width of the host.
        init: Initialisation of the linear layer (Table 7b): ``zero`` adds nothing to the resized embedding,
            ``residual`` adds the convolution's output (identity), ``nonzero`` is PyTorch's random initialisation.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If the initialisation is unknown.
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
    """Embed patches by Eq. 2, by calling the modules.

    Args:
        embed: The host's patch embedding E.
        coarse: `CoarsePatchEmbed`; None for patches that are only resized.
        images: (b, C, H, W) as the host reads them.
        selections: The patches of each scale.

    Returns:
        For each scale (n_i, D).
    """
    image, row, col = selections[0]
    # (b, D, h, w): each base cell is a token, or part of a coarse patch; without either, no image is embedded
    cells = embed(images if coarse is not None or len(image) else images[:0])
    rows = [cells[image, :, row, col]]
    for scale, (image, row, col) in enumerate(selections[1:], start=1):
        factor = 1 << scale
        height, width = (side // factor for side in cells.shape[2:])
        if not height * width:  # images are smaller than a patch
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
    """The affine map of Eq. 2 at each scale, found by calling the modules on unit patches.

    Args:
        embed: The host's patch embedding.
        coarse: `CoarsePatchEmbed`, or None.
        black: (1, C, p, p) zeros, of the host's type and device.

    Attributes:
        weight: (D, C, p, p) weight of the host's patch embedding.
        bias: (D,) bias of the host's patch embedding.
    """

    def __init__(self, embed: Embed, coarse: nn.Module | None, black: Tensor) -> None:
        self._coarse: Any = coarse
        self._lock = Lock()
        # Brightness of unit patches: a power of two that is large beside a bias, which would round the weights.
        self._unit = 2.0**12 if black.dtype == torch.float16 else 2.0**20
        with torch.autocast(black.device.type, enabled=False):
            units = torch.eye(black.numel(), device=black.device, dtype=black.dtype).mul_(self._unit)
            self.bias = embed(black)[0, :, 0, 0]  # (D,)
            rows = (embed(units.unflatten(1, black.shape[1:]))[:, :, 0, 0] - self.bias) / self._unit  # (C p^2, D)
        self.weight = rows.T.unflatten(1, black.shape[1:])  # (D, C, p, p)
        self._scales: dict[int, tuple[Tensor, Tensor]] = {0: (self.weight.flatten(1).contiguous(), self.bias)}

    def embed(self, read: PatchReader, selections: Sequence[Selection]) -> list[Tensor]:
        """As `embed_directly`, with one matrix product for each scale.

        Args:
            read: Cuts patches out of the images, from `patch_reader`.
            selections: The patches of each scale.

        Returns:
            For each scale (n_i, D).
        """
        side = self.weight.shape[-1]
        patches = (read(*selection, side << scale) for scale, selection in enumerate(selections))
        return [F.linear(rows, *self.of_scale(scale)) for scale, rows in enumerate(patches)]

    def of_scale(self, scale: int) -> tuple[Tensor, Tensor]:
        """Weight (D, C (2^scale p)^2) and bias (D,), cached."""
        with self._lock, torch.autocast(self.bias.device.type, enabled=False):
            if scale not in self._scales:
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
        """Compose a map with the 2x2 convolution. (D, C, s, s) -> (D, C, 2 s, 2 s), and the bias (D,)."""
        conv, (channels, side) = self._coarse.conv, parts.shape[1:3]
        rows = parts.flatten(1).T * self._unit  # (C s^2, D)
        cells = rows.new_zeros(*rows.shape, 2, 2)
        zero = conv(cells[:1])[:, :, 0, 0]
        grown = parts.new_zeros(parts.shape[0], channels, 2, side, 2, side)
        for i in (0, 1):
            for j in (0, 1):
                cells.zero_()[:, :, i, j] = rows
                weight = ((conv(cells)[:, :, 0, 0] - zero) / self._unit).T  # (D, C s^2)
                grown[:, :, i, :, j] = weight.unflatten(1, (channels, side, side))
        constant = offset[None, :, None, None].expand(1, -1, 2, 2)
        return grown.flatten(4, 5).flatten(2, 3), conv(constant)[0, :, 0, 0]


def resize_weight(weight: Tensor, factor: int) -> Tensor:
    """The weight of a patch embedding after `reduce_images`, as a weight on the pixels of the large patch.

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
    """A function that cuts patches out of images, normalised and of the model's type.

    Args:
        images: (b, C, H, W) floats, or raw uint8 pixels, which are normalised.
        normalization: Normalisation of raw images.
        dtype: Type of the model.

    Returns:
        `gather_patches` for these images.
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
        order = self.order = key.argsort(stable=True)  # (N,) number in the layout of each sorted patch
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
        """(P, ...) prefix tokens and (N, ...) sorted patches -> (T, ...) packed tokens."""
        return torch.cat([prefix, patches]).index_select(0, self.source)
