"""An adaptive model as the backbone of heads from torchvision and transformers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aptvit.dense.detail import CellDetail
from aptvit.dense.pyramid import SimplePyramid
from aptvit.encoder.encoder import BlockOutputs
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.models.base import take_indices
from aptvit.patching.layout import PatchLayout
from aptvit.scorers.preview import Preview, PreviewScorer

__all__ = ["DetectionBackbone", "TransformersBackbone"]


class DetectionBackbone(nn.Module):
    """A backbone for torchvision's detection models: returns levels by name, and has ``out_channels``.

    Args:
        model: The adaptive model.
        out_channels: Channels of each level.
        detail: Refine the map where patches are coarse, see `CellDetail`.
    """

    def __init__(self, model: AdaptivePatchTransformer, out_channels: int = 256, detail: bool = True) -> None:
        super().__init__()
        self.model = model
        self.cell_detail = CellDetail(model) if detail else None
        self.neck = SimplePyramid(model.embed_dim, out_channels)
        self.out_channels = out_channels
        if isinstance(model.patchifier.scorer, PreviewScorer):
            model.patchifier.scorer.preview = Preview(self, self._maps_of_outputs)

    def _maps_of_outputs(self, outputs: BlockOutputs, layout: PatchLayout) -> list[Tensor]:
        return self.model.feature_maps(outputs, layout, [len(self.model.adapter.blocks) - 1])

    @property
    def stride(self) -> int:
        """Side in pixels of a patch, or of a window; sides of images are multiples of it."""
        return self.model.patch_size * (self.model.window_size or 1)

    def maps(self, images: Tensor, layout: PatchLayout | None = None) -> list[Tensor]:
        """The map of the last block, before the neck.

        Args:
            images: (B, C, H, W) normalised images.
            layout: The layout of the images; by default it is computed.

        Returns:
            One map (B, D, H/p, W/p).
        """
        layout = self.model.layout(images, learn=True) if layout is None else layout
        maps = self.plain_maps(images, layout)
        return maps if self.cell_detail is None else [self.cell_detail(maps[0], images, layout)]

    def plain_maps(self, images: Tensor, layout: PatchLayout) -> list[Tensor]:
        """`maps` without refinement by `CellDetail`: one map (B, D, H/p, W/p). Arguments as for `maps`."""
        maps: list[Tensor] = self.model.forward_intermediates(images, indices=1, intermediates_only=True, layout=layout)
        return maps

    def forward(self, images: Tensor, layout: PatchLayout | None = None) -> OrderedDict[str, Tensor]:
        """Levels of a feature pyramid, in float32, which boxes need.

        Args:
            images: (B, C, H, W) normalised images.
            layout: The layout of the images; by default it is computed.

        Returns:
            Levels "0" to "3" and "pool", (B, out_channels, 4 H/p, 4 W/p) and halved at each further level.
        """
        (last,) = self.maps(images, layout)
        return OrderedDict((name, level.float()) for name, level in self.neck(last).items())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks and the neck; takes the arguments of ``torch.compile``."""
        self.model.compile(*args, **kwargs)
        self.neck.compile(*args, **kwargs)


class TransformersBackbone(nn.Module):
    """A backbone for heads of transformers (UperNet, DPT, Mask2Former, ...), with ``feature_maps`` and ``channels``.

    Assign it to a model of transformers that was built with a backbone of the same channels, or pass it to a head:
    ``model.backbone = TransformersBackbone(adaptive, [2, 5, 8, 11])``.

    Args:
        model: The adaptive model.
        indices: Blocks whose outputs are returned, from early to late.
        norm: Apply the model's final normalisation to each map.
        neck: From these maps to levels, such as `DepthPyramid`; by default the maps are returned.
        sequence: Return (B, 1 + h w, D) rows, the class token first, instead of maps, for DPT and Depth Anything.
        detail: Refine each map where patches are coarse, see `CellDetail`; not with ``sequence``.

    Raises:
        ValueError: If ``sequence`` is combined with a neck or detail, or with a model without a class token.
    """

    def __init__(
        self,
        model: AdaptivePatchTransformer,
        indices: Sequence[int],
        norm: bool = False,
        neck: nn.Module | None = None,
        sequence: bool = False,
        detail: bool = False,
    ) -> None:
        super().__init__()
        if sequence and (model.num_prefix_tokens == 0 or neck is not None or detail):
            raise ValueError(
                "sequence=True puts the class token before the rows of a map: it needs one, no neck and no detail"
            )
        self.model = model
        self.indices = list(indices)
        self.norm = norm
        self.neck = neck
        self.sequence = sequence
        self.cell_detail = nn.ModuleList(CellDetail(model) for _ in self.indices) if detail else None
        self.channels = [model.embed_dim] * len(self.indices)
        self.out_features = [f"stage{index % len(model.feature_info) + 1}" for index in self.indices]
        if not sequence and isinstance(model.patchifier.scorer, PreviewScorer):
            model.patchifier.scorer.preview = self.preview()

    def preview(self, network: nn.Module | None = None, answers: Any = None) -> Preview:
        """The `Preview` for ``scorer="preview"``.

        Args:
            network: The whole network, if this backbone is a part of one.
            answers: From maps to (B, K, H', W') outputs at each place; by default the last map.
        """
        options: dict[str, Any] = {} if answers is None else {"answers": answers}
        return Preview(network or self, self._maps_of_outputs, stop=max(self._blocks) + 1, **options)

    def _maps_of_outputs(self, outputs: BlockOutputs, layout: PatchLayout) -> list[Tensor]:
        return self.model.feature_maps(outputs, layout, self._blocks, norm=self.norm)

    @property
    def _blocks(self) -> list[int]:
        return take_indices(self.indices, len(self.model.adapter.blocks))

    def maps(self, images: Any, layout: PatchLayout | None = None) -> list[Tensor]:
        """Maps before the neck.

        Args:
            images: (B, C, H, W) normalised images.
            layout: The layout of the images; by default it is computed.

        Returns:
            A map (B, D, H/p, W/p) for each index, or (B, 1 + h w, D) rows with ``sequence``.
        """
        layout = self.model.layout(images, learn=True) if layout is None else layout
        maps = self.plain_maps(images, layout)
        if self.cell_detail is None:
            return maps
        return [detail(image_map, images, layout) for detail, image_map in zip(self.cell_detail, maps, strict=True)]

    def plain_maps(self, images: Any, layout: PatchLayout) -> list[Tensor]:
        """`maps` without refinement by `CellDetail`, (B, D, H/p, W/p) each. Arguments as for `maps`."""
        maps = self.model.forward_intermediates(
            images,
            indices=self.indices,
            return_prefix_tokens=self.sequence,
            norm=self.norm,
            stop_early=True,
            output_fmt="NLC" if self.sequence else "NCHW",
            intermediates_only=True,
            layout=layout,
        )
        if self.sequence:
            return [torch.cat([prefix[:, :1], rows], dim=1) for rows, prefix in maps]
        return list(maps)

    def feature_maps(self, images: Any, layout: PatchLayout | None = None) -> list[Tensor]:
        """The outputs of the backbone.

        Args:
            images: (B, C, H, W) normalised images.
            layout: The layout of the images; by default it is computed.

        Returns:
            The levels of the neck; without a neck as `maps`, (B, D, H/p, W/p) for each index.
        """
        return self.levels(self.maps(images, layout))

    def levels(self, maps: Sequence[Tensor]) -> Any:
        """The neck's outputs; without a neck the maps.

        Args:
            maps: From `maps`.
        """
        return list(maps) if self.neck is None else self.neck(maps)

    def forward(self, pixel_values: Any, **_: Any) -> Any:
        """(B, C, H, W) normalised images -> ``BackboneOutput`` of transformers with `feature_maps`."""
        from transformers.modeling_outputs import BackboneOutput

        return BackboneOutput(feature_maps=tuple(self.feature_maps(pixel_values)))

    forward_with_filtered_kwargs = forward

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks, and the neck where there is one; takes the arguments of ``torch.compile``."""
        self.model.compile(*args, **kwargs)
        if self.neck is not None:
            self.neck.compile(*args, **kwargs)
