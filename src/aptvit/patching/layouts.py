"""Layouts without scores: patches of one size, images taken from other batches, and checks of a user's layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aptvit.patching.images import ImageGroup
from aptvit.patching.layout import PatchLayout
from aptvit.patching.patchifier import Patchifier

__all__ = ["check_layout", "layout_of_images", "uniform_layout"]


def uniform_layout(
    num_images: int,
    grid_size: tuple[int, int],
    patch_size: int,
    num_scales: int,
    num_prefix_tokens: int = 0,
    window_size: int | None = None,
    device: torch.device | str | None = None,
    scale: int = 0,
) -> PatchLayout:
    """Layout of images of one size in patches of one size. Does not synchronise with the device.

    Args:
        num_images: B.
        grid_size: Base patches of each image, (rows, columns).
        patch_size: Side of a base patch in pixels.
        num_scales: Scales of the model.
        num_prefix_tokens: Prefix tokens of each image.
        window_size: Side of a window in base patches.
        device: Device of the images.
        scale: Scale of all patches; 0 for nothing merged. Incomplete patches at the right and bottom are left out.

    Raises:
        ValueError: As for `PatchLayout.from_scale_map`.
    """
    height, width = (side >> scale for side in grid_size)
    scale_map = torch.full((num_images, *grid_size), -1, dtype=torch.int8, device=device)
    scale_map[:, : height << scale, : width << scale] = scale
    counts = [[height * width * (number == scale) for number in range(num_scales)]] * num_images
    window_counts = None
    if window_size is not None:
        cells = (window_size >> scale) ** 2
        window_counts = [[cells] * (height * width // cells)] * num_images
    return PatchLayout.from_scale_map(
        scale_map,
        patch_size,
        num_scales,
        num_prefix_tokens,
        window_size=window_size,
        counts=counts,
        window_counts=window_counts,
    )


def layout_of_images(sources: Sequence[tuple[PatchLayout, int]]) -> PatchLayout:
    """Layout of a batch whose images are taken from other batches. Does not synchronise with the device.

    Args:
        sources: For each image of the new batch, a layout without windows and the image's number in that layout.

    Raises:
        ValueError: If there are no images, or the layouts were made for different models.
    """
    if not sources:
        raise ValueError("there are no images: give at least one")
    settings = {(layout.patch_size, layout.num_prefix_tokens, layout.num_scales) for layout, _ in sources}
    if len(settings) != 1:
        raise ValueError(f"layouts with (patch size, prefix tokens, scales) of {sorted(settings)} cannot be one batch")
    ((patch_size, num_prefix_tokens, num_scales),) = settings
    grids = [layout.grid_sizes[image] for layout, image in sources]
    height, width = (max(side) for side in zip(*grids, strict=True))
    scale_map = sources[0][0].scale_map.new_full((len(sources), height, width), -1)
    for place, ((layout, image), (rows, cols)) in enumerate(zip(sources, grids, strict=True)):
        scale_map[place, :rows, :cols] = layout.scale_map[image, :rows, :cols]
    counts = [layout.counts[image] for layout, image in sources]
    return PatchLayout.from_scale_map(scale_map, patch_size, num_scales, num_prefix_tokens, grids, counts=counts)


def check_layout(layout: PatchLayout, groups: Sequence[ImageGroup], patchifier: Patchifier) -> None:
    """Check that a layout belongs to these images and this model.

    Args:
        layout: The layout.
        groups: The images by size.
        patchifier: The model's patchifier.

    Raises:
        ValueError: If the layout was made for another model, or for images of other sizes.
    """
    size, prefix = patchifier.patch_size, patchifier.num_prefix_tokens
    if (got := (layout.patch_size, layout.num_prefix_tokens)) != (size, prefix):
        raise ValueError(
            f"the layout has (patch size, prefix tokens) {got}, the model {(size, prefix)}: use model.layout"
        )
    if (layout.window_packing is None) != (patchifier.window_size is None):
        raise ValueError("the layout and the model do not agree on windows: use model.layout")
    grids = {i: group.grid_size(size) for group in groups for i in group.index}
    if layout.grid_sizes != [grids[i] for i in range(len(grids))]:
        raise ValueError(
            f"the layout is of {layout.num_images} images, the first with {layout.grid_sizes[0]} patches; "
            f"these are {len(grids)}, the first with {grids[0]}: use model.layout on the same images"
        )
