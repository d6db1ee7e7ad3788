"""Protocols of scorers, the two scorers of the paper's appendix, and one that finds patches of one colour.

A scorer is any callable of the `Scorer` protocol: it scores all candidate patches of an image. A low score means that
the patch can stay coarse. Patches that do not lie wholly inside the image have no score and are never coarse. The
paper's main scorer is in `aptvit.patching.entropy`; scorers that need a model are in `aptvit.scorers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from aptvit.patching.entropy import EntropyScorer
from aptvit.patching.images import ImageGroup
from aptvit.patching.layout import PatchLayout

__all__ = [
    "CountedScorer",
    "EncodingScorer",
    "ExactScorer",
    "ImageScorer",
    "LaplacianScorer",
    "Scorer",
    "UpsampleScorer",
    "get_scorer",
    "shape_error",
    "to_gray",
]


class Scorer(Protocol):
    """A callable that scores candidate patches."""

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        """Score the patches of each size.

        Args:
            pixels: (B, C, H, W) float32 on the 0..255 scale; H and W are multiples of ``patch_size``.
            patch_size: Side of a base patch in pixels.
            factors: Sizes to score, in base patches: 2, 4, 8, ...

        Returns:
            For each factor f, (B, H // (f p), W // (f p)) scores of the patches that lie wholly inside the image.
        """
        ...


class ImageScorer(Protocol):
    """A scorer that also reads images as the model receives them, which saves a pass over the pixels."""

    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """As `Scorer`, for images as the model receives them.

        Args:
            images: (B, C, H, W) raw pixels as uint8, or floats normalised with ``mean`` and ``std``.
            mean: (C,) of pixels in [0, 1].
            std: (C,) of pixels in [0, 1].
            patch_size: Side of a base patch in pixels.
            factors: Sizes to score, in base patches.
        """
        ...


@runtime_checkable
class CountedScorer(Protocol):
    """A scorer that reports its operations; those of other scorers are neglected."""

    def flops(self, factors: Sequence[int]) -> Callable[[int], float]:
        """Operations of scoring one image, a multiplication and an addition counted as two.

        Args:
            factors: Sizes to score, in base patches.

        Returns:
            Number of base patches -> operations.
        """
        ...


@runtime_checkable
class EncodingScorer(Protocol):
    """A scorer that runs the encoder's blocks; the encoder reuses their results (`PatchLayout.cache`)."""

    def score_groups(self, groups: Sequence[ImageGroup], factors: Sequence[int], learn: bool) -> tuple[list[Any], Any]:
        """Score the images of a batch.

        Args:
            groups: The images by size.
            factors: Sizes to score, in base patches.
            learn: Record gradients through the results that are reused.

        Returns:
            For each group its scores as `Scorer` returns them, and the cache of the whole batch.
        """
        ...

    def with_cache(self, layout: PatchLayout, groups: Sequence[ImageGroup], learn: bool) -> PatchLayout:
        """A user's layout with the cache of these images.

        Args:
            layout: The layout of the images.
            groups: The images by size.
            learn: As for `score_groups`; a cache without gradients is replaced.
        """
        ...


def shape_error(scores: Any, shapes: Mapping[int, tuple[int, ...]]) -> ValueError:
    """The error of a scorer that returned something else than a tensor of each shape.

    Args:
        scores: What it returned.
        shapes: The expected shape for each factor.
    """

    def describe(value: Any) -> str:
        return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"

    got = describe(scores)
    if isinstance(scores, Mapping):
        got = f"{{{', '.join(f'{factor!r}: {describe(value)}' for factor, value in scores.items())}}}"
    return ValueError(
        f"a scorer must return a dict of tensors by factor, here of shapes {dict(shapes)}; it returned {got}"
    )


def to_gray(pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W): 0.2989 R + 0.5870 G + 0.1140 B; the mean of channels where there are not three."""
    if pixels.shape[1] != 3:
        return pixels.mean(1)
    return (pixels[:, 0] * 0.2989).add_(pixels[:, 1], alpha=0.5870).add_(pixels[:, 2], alpha=0.1140)


class LaplacianScorer:
    """Mean absolute response of the 8-connected Laplacian on gray values in [0, 1], edges reflected (figure 10).

    Where there are not three channels, the mean over the channels.
    """

    name = "laplacian"

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        gray = (to_gray(pixels)[:, None] if pixels.shape[1] == 3 else pixels) / 255  # (B, 1, H, W), or each channel
        neighbourhood = F.avg_pool2d(F.pad(gray, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        response = (gray - neighbourhood).abs_().mul_(9).mean(1, keepdim=True)  # |8 x - the eight neighbours|
        return {factor: _cell_means(response, factor * patch_size) for factor in factors}


def _cell_means(response: Tensor, side: int) -> Tensor:
    """(B, 1, H, W) -> (B, H // side, W // side), incomplete cells cut off; there may be none."""
    batch, _, height, width = response.shape
    if height < side or width < side:
        return response.new_zeros(batch, height // side, width // side)
    return F.avg_pool2d(response, side).squeeze(1)


class UpsampleScorer:
    """Mean squared error of the image in [0, 1] after bilinear reduction by the patch's factor and back (figure 10)."""

    name = "upsample"

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        pixels = pixels / 255
        maps = {}
        for factor in factors:
            side = factor * patch_size
            whole = pixels[:, :, : pixels.shape[2] // side * side, : pixels.shape[3] // side * side]
            if whole.numel() == 0:  # smaller than one patch
                maps[factor] = _cell_means(whole[:, :1], side)
                continue
            small = F.interpolate(whole, scale_factor=1 / factor, mode="bilinear", align_corners=False)
            enlarged = F.interpolate(small, size=whole.shape[2:], mode="bilinear", align_corners=False)
            maps[factor] = _cell_means((enlarged - whole).square_().mean(1, keepdim=True), side)
        return maps


class ExactScorer:
    """Largest difference of two pixels of a patch, in levels of 0 to 255, over all channels.

    ``thresholds=(1.0, 1.0)`` merges only patches of one colour, such as the white of a page: no pixel is lost. A higher
    threshold allows for noise, such as that of JPEG.
    """

    name = "exact"

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        least, most, side, maps = -pixels, pixels, 1, {}
        for factor in sorted(factors):
            step = factor * patch_size // side  # of the patches of the factor before
            least, most, side = _cell_maxima(least, step), _cell_maxima(most, step), factor * patch_size
            maps[factor] = (most + least).amax(1)
        return maps


def _cell_maxima(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H // side, W // side), incomplete cells cut off; there may be none."""
    height, width = x.shape[2:]
    if height < side or width < side:
        return x.new_zeros(*x.shape[:2], height // side, width // side)
    return F.max_pool2d(x, side)


_SCORERS: dict[str, Callable[[], Scorer]] = {
    "entropy": EntropyScorer,
    "laplacian": LaplacianScorer,
    "upsample": UpsampleScorer,
    "exact": ExactScorer,
}


def get_scorer(scorer: str | Scorer, more_names: Sequence[str] = ()) -> Scorer:
    """The scorer of this name, or the callable itself.

    Args:
        scorer: A name, or a callable.
        more_names: Names of scorers that need a model, for the error message.

    Raises:
        ValueError: If there is no scorer of this name.
    """
    if callable(scorer):
        return scorer
    if scorer not in _SCORERS:
        names = ", ".join((*_SCORERS, *more_names))
        hint = (
            "" if more_names else ". Scorers that read the model's own embedding come with aptvit.adapt(vit, scorer=…)"
        )
        raise ValueError(f"unknown scorer {scorer!r}: use one of {names}, or a callable{hint}")
    return _SCORERS[scorer]()
