"""Recipe settings that detection and segmentation share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aptvit.training.recipes.common import Recipe, check_positive

__all__ = ["DenseRecipe"]


@dataclass(frozen=True, kw_only=True)
class DenseRecipe(Recipe):
    """Settings for training a detector or segmenter, in addition to those of `Recipe`.

    Attributes:
        method: ``"apt"``, or a baseline with feature maps: ``"uniform"``, ``"resize"``.
        trains: The parameters that are trained: ``"all"``; the ``"new"`` parameters of the method; or these and the
            ``"heads"``, all parameters outside the pretrained model.
        size: Side of the training crops in pixels; a detector evaluates images with this as their longer side.
        jitter: Smallest and largest scale of images in training, relative to where the longer side is ``size``.
        window: Side of attention windows in base patches; 0 for none.
        global_blocks: Numbers of the blocks without windows, counted from 0.
        channels: Number of channels of the pyramid and the heads.
        detail: Whether to refine feature maps inside coarse patches, see `aptvit.dense.CellDetail`.
        from_maps: Whether to train on the feature maps of the uniform network that the training starts from. Labels are
            used in evaluation only, and heads are not trained.

    Raises:
        ValueError: If a value is out of range, or two values contradict each other.
    """

    method: Literal["apt", "uniform", "resize"] = "apt"
    trains: Literal["all", "new", "heads"] = "all"
    size: int = 512
    jitter: tuple[float, ...] = (0.5, 2.0)
    window: int = 0
    global_blocks: tuple[int, ...] = ()
    channels: int = 256
    detail: bool = True
    from_maps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ["size", "channels"])
        if self.method not in ("apt", "uniform", "resize"):
            raise ValueError(f"method={self.method} has no feature maps: use apt, resize or uniform")
        if len(self.jitter) != 2 or not 0 < self.jitter[0] <= self.jitter[1]:
            raise ValueError(f"jitter={self.jitter} must be the smallest and the largest scale")
        if self.from_maps and (self.method == "uniform" or self.trains == "heads"):
            raise ValueError(
                "from_maps trains the maps of an adaptive network: leave out method=uniform and trains=heads"
            )
        if self.global_blocks and not self.window:
            raise ValueError(f"global_blocks={list(self.global_blocks)} needs window: without it all blocks are global")
