"""Pixels of the chosen patches to tokens: one linear map per scale.

Equation 2 of the paper, x_P = E(resize(P)) + Zero(Conv^i({E(P_j)})), has no non-linearity: resizing, the patch
embedding E, the 2x2 convolution and the zero-initialised layer are all affine. So scale i has one weight of shape
(D, C (2^i p)^2) and one bias, composed from the parameters, and a token is one row of one matrix product:

    chosen patches of scale i ── gather ──> (n_i, C (2^i p)^2) ── W_i, b_i ──> (n_i, D)
    all scales, and the prefix tokens ── one gather ──> (T, D) in packed order
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from aptvit.patching.images import ImageGroup
from aptvit.patching.kernels import has_triton
from aptvit.patching.layout import PatchLayout
from aptvit.patching.patchifier import Patchifier

__all__ = [
    "CoarsePatchEmbed",
    "PackedOrder",
    "ParameterCache",
    "gather_patches",
    "is_new",
    "patch_reader",
    "resize_weight",
]

COARSE_PREFIX = "coarse_embed"  # the one prefix under which new parameters of a model live
DETAIL_PREFIX = "cell_detail"  # of what refines its maps, in networks around it
GLANCE = "coarse_glance"  # of the network that foresees, see aptvit.scorers.glance

T = TypeVar("T")
Init = Literal["zero", "residual", "nonzero"]


def is_new(name: str) -> bool:
    """Whether a name, of a model or a network around it, is of something that the uniform model does not have."""
    return any(f"{prefix}." in name for prefix in (COARSE_PREFIX, DETAIL_PREFIX, GLANCE))


def resize_weight(weight: Tensor, factor: int) -> Tensor:
    """The patch embedding of a patch after bilinear reduction, as a map of the patch's own pixels.

    Reduction by an even factor without antialiasing, as in the released code, is the mean of the central 2x2 pixels
    of each ``factor`` x ``factor`` block.

    Args:
        weight: (D, C, p, p) weight of the host's patch embedding.
        factor: 2^i.

    Returns:
        (D, C, factor p, factor p).
    """
    if factor == 1:
        return weight
    kernel = weight.new_zeros(factor)
    kernel[factor // 2 - 1 : factor // 2 + 1] = 0.5
    # (D, C, p, 1, p, 1) * (f, 1, f) -> (D, C, p, f, p, f) -> (D, C, p f, p f)
    spread = weight[:, :, :, None, :, None] * (kernel[:, None, None] * kernel)
    return spread.flatten(4, 5).flatten(2, 3)


class CoarsePatchEmbed(nn.Module):
    """The new parameters: how the sub-patches of a coarse patch add to its resized embedding (Eq. 2).

    One 2x2 convolution, applied i times at scale i, and one linear layer, both shared by all scales.

    Args:
        dim: Width of the host.
        init: How the linear layer starts (Table 7b): ``zero`` leaves the resized embedding alone, ``residual`` adds
            the convolution's output as it is, ``nonzero`` has the usual random start.
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

    def compose(self, weight: Tensor, bias: Tensor | None, factor: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the one affine map that Eq. 2 is, for patches of ``factor`` x ``factor`` base patches.

        Args:
            weight: (D, C, p, p) weight of the host's patch embedding E.
            bias: (D,) its bias.
            factor: 2^i; 1 gives E itself.

        Returns:
            Weight (D, C (factor p)^2) and bias (D,).
        """
        if factor == 1:
            return weight.flatten(1), bias
        dim = len(weight)
        parts = weight
        base = torch.zeros_like(weight[:, 0, 0, 0]) if bias is None else bias
        offset = base
        conv_bias = self.conv.bias
        assert conv_bias is not None
        taps = self.conv.weight.permute(0, 2, 3, 1).flatten(0, 2)  # (D, D, 2, 2) -> (D 2 2, D)
        for _ in range(factor.bit_length() - 1):
            channels, side = parts.shape[1:3]
            grown = (taps @ parts.flatten(1)).view(dim, 2, 2, channels, side, side)
            # (D, a, b, C, s, s) -> (D, C, a, s, b, s) -> (D, C, 2 s, 2 s)
            parts = grown.permute(0, 3, 1, 4, 2, 5).reshape(dim, channels, 2 * side, 2 * side)
            offset = self.conv.weight.sum((2, 3)) @ offset + conv_bias
        composed = resize_weight(weight, factor).flatten(1) + self.linear.weight @ parts.flatten(1)
        return composed, base + self.linear.weight @ offset + self.linear.bias


def gather_patches(images: Tensor, image: Tensor, row: Tensor, col: Tensor, side: int) -> Tensor:
    """Cut patches out of images.

    Args:
        images: (b, C, H, W).
        image: (n,) image of each patch.
        row: (n,) its row, in patches.
        col: (n,) its column, in patches.
        side: Side of a patch in pixels.

    Returns:
        (n, C side^2) rows in the order of a convolution's weight.
    """
    height, width = images.shape[2] // side, images.shape[3] // side
    whole = images[:, :, : height * side, : width * side]
    # (b, C, h, side, w, side) -> (b, h, w, C, side, side): a view; only the chosen patches are copied
    cells = whole.unflatten(3, (width, side)).unflatten(2, (height, side)).permute(0, 2, 4, 1, 3, 5)
    return cells[image, row, col].flatten(1)


def patch_reader(
    patchifier: Patchifier, images: Tensor, dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """`gather_patches` of images as a model reads them: normalised, and of its type.

    Args:
        patchifier: Knows how raw images are normalised.
        images: (b, C, H, W).
        dtype: Of the model.

    Returns:
        (image, row, col, side) -> (n, C side^2).
    """
    if images.is_cuda and has_triton() and not images.requires_grad:
        from aptvit.patching.kernels import gather_triton

        return partial(gather_triton.gather_patches, images, mean=patchifier.mean, std=patchifier.std, dtype=dtype)
    return partial(gather_patches, patchifier.normalised(images).to(dtype))


class PackedOrder:
    """From rows computed scale by scale, group by group, to the order of the packed sequence.

    Patches of one scale and one image size are gathered and embedded together; ``selections`` lists them in that
    order, and ``source_of_row`` tells where the layout wants the rows that are made of them.

    Args:
        layout: The layout of the whole batch.
        groups: Its images by size.
    """

    def __init__(self, layout: PatchLayout, groups: Sequence[ImageGroup]) -> None:
        self.layout = layout
        device = layout.image.device
        group_of, local = [0] * layout.num_images, [0] * layout.num_images
        for number, group in enumerate(groups):
            for position, image in enumerate(group.index):
                group_of[image], local[image] = number, position
        key, local_of_patch, self._group_of_patch = layout.scale, layout.image, None
        if len(groups) > 1:
            self._group_of_patch = torch.tensor(group_of).to(device, non_blocking=True)[layout.image]
            key = key * len(groups) + self._group_of_patch
            local_of_patch = torch.tensor(local).to(device, non_blocking=True)[layout.image]
        self._order = key.argsort(stable=True)
        # One after the other, image within the group, row and column in patches of their scale.
        which = torch.stack([local_of_patch, layout.row >> layout.scale, layout.col >> layout.scale])
        self._which = which.index_select(1, self._order)
        self._sizes = [
            sum(layout.counts[image][scale] for image in group.index)
            for scale in range(layout.num_scales)
            for group in groups
        ]
        self._num_groups = len(groups)

    def selections(self, scale: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each group: (n,) image within the group, row and column in patches of this scale."""
        sizes = self._sizes[: (scale + 1) * self._num_groups]
        parts = self._which[:, : sum(sizes)].split(sizes, dim=1)[scale * self._num_groups :]
        return [(image, row, col) for image, row, col in parts]

    def source_of_row(self) -> Tensor:
        """(T,) for each row of the packed sequence, its source in [prefix rows, rows of selections in order]."""
        layout = self.layout
        prefix = layout.num_prefix_tokens
        source = torch.zeros(layout.num_tokens, dtype=torch.long, device=layout.image.device)
        count = torch.arange(prefix, prefix + layout.num_patches, device=source.device)
        source[layout.patch_index[self._order]] = count
        if prefix > 1:
            front = torch.arange(prefix, device=source.device)
            source[layout.cu_seqlens[:-1, None].long() + front] = front
        return source

    def of_tokens(self, place: Tensor) -> Tensor:
        """(G, S, h, w) what each patch has at its scale and top left cell -> (T,); 0 of prefix tokens."""
        layout = self.layout
        where = (layout.scale, layout.row, layout.col)
        its = place[0][where] if self._group_of_patch is None else place[self._group_of_patch, *where]
        if not layout.num_prefix_tokens:
            return its
        all_tokens = its.new_zeros(layout.num_tokens)
        all_tokens[layout.patch_index] = its
        return all_tokens


class ParameterCache:
    """Values computed from parameters, kept for as long as gradients are off and no parameter has changed.

    Args:
        capacity: Values to keep; the oldest makes room.
    """

    def __init__(self, capacity: int = 32) -> None:
        self._capacity = capacity
        self._entries: dict[Any, tuple[list[Tensor], list[tuple[int, int]], Any]] = {}

    def get(self, key: Any, parameters: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """The kept value of ``compute`` for this key, or a new one."""
        if torch.is_grad_enabled():
            return compute()
        # Values change with the version, memory with model.to(), parameters when others take their place.
        state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        kept = self._entries.get(key)
        if kept is not None and kept[1] == state and all(map(operator.is_, kept[0], parameters)):
            return kept[2]
        value = compute()
        self._entries.pop(key, None)
        while len(self._entries) >= self._capacity:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = (list(parameters), state, value)
        return value

    def clear(self) -> None:
        self._entries.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> ParameterCache:
        return ParameterCache(self._capacity)

    def __getstate__(self) -> dict[str, Any]:
        return {"_capacity": self._capacity, "_entries": {}}
