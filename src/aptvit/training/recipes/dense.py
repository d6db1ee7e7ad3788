"""Settings that detection and segmentation share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aptvit.training.recipes.common import Recipe, check_positive

__all__ = ["DenseRecipe"]


@dataclass(frozen=True, kw_only=True)
class DenseRecipe(Recipe):
    """Settings of trainings of a network around a backbone.

    Attributes:
        method: ``"apt"``; or a baseline that has feature maps: ``"uniform"``, ``"resize"``.
        trains: ``"all"`` parameters; only the ``"new"`` ones of the method; or these and the ``"heads"`` around the
            pretrained model.
        size: Side of the training crops in pixels; a detector evaluates images with this as their longer side.
        jitter: Smallest and largest scale of images in training, relative to where the longer side is ``size``.
        window: Side of attention windows in base patches; 0 for none.
        global_blocks: Blocks without windows, counted from 0.
        channels: Of the pyramid and the heads.
        detail: Refine feature maps where patches are coarse, see `aptvit.dense.CellDetail`.
        from_maps: The uniform network that the training starts from is the teacher of the feature maps: labels are read
            in evaluation only, and heads stay as they are.
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
            raise ValueError("from_maps trains the maps of an adaptive network: leave out method=uniform, trains=heads")
        if self.global_blocks and not self.window:
            raise ValueError(f"global_blocks={list(self.global_blocks)} needs window: without it all blocks are global")
