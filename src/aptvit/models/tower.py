"""Vision towers of transformers on adaptive patches: the forward of `aptvit.models.adaptive_vit` with the inputs and
outputs of transformers.

The model around a tower (a classifier, CLIP with its text tower) runs unchanged; only the tower's forward is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from aptvit.encoder.encoder import Request, Tokens
from aptvit.hosts.adapter import HOST_ATTRIBUTES
from aptvit.hosts.statistics import normalisation
from aptvit.hosts.transformers import TowerOutput, release_checkpointing
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.budget import CallBudget
from aptvit.patching.features import PackedFeatures
from aptvit.patching.images import Images
from aptvit.patching.layout import PatchLayout

__all__ = ["AdaptiveTower"]


@dataclass(frozen=True, eq=False)
class _Features(PackedFeatures):
    """Normalised tokens of the last block, with the further outputs of a call.

    Attributes:
        hidden_states: (T, D) input of each block and output of the last block; None if not requested.
        restore_grid: Whether to return tokens of the full grid.
    """

    hidden_states: tuple[Tensor, ...] | None = None
    restore_grid: bool = False


class AdaptiveTower(AdaptivePatchTransformer):
    """A vision tower of transformers, or a model that contains a tower, on adaptive patches.

    It has the inputs and outputs of its host: ``model(**processor(images, return_tensors="pt"))``. Other methods
    (``get_image_features``, ``get_text_features``, ...) are the host's.

    Args:
        host: The pretrained model.
        processor: The model's own processor or image processor, for the normalisation of images; by default its file
            beside the weights is read, and if there is none, the statistics of the model's family are used.
        options: As for `AdaptivePatchTransformer`.

    Raises:
        ValueError: If the model cannot be adapted, or an option is out of range.
    """

    host_library: ClassVar[str] = "transformers"
    adapter: Any  # a TransformersAdapter

    def __init__(self, host: nn.Module, *, processor: Any = None, **options: Any) -> None:
        if processor is not None:
            statistics = zip(("mean", "std"), normalisation(processor), strict=True)
            options = {**dict(statistics), **{key: value for key, value in options.items() if value is not None}}
        super().__init__(host, **options)
        self.adapter.core.forward = self._tower_forward

    def forward(  # type: ignore[override]
        self,
        pixel_values: Images | None = None,
        layout: PatchLayout | None = None,
        restore_grid: bool = False,
        labels: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """Run the host on adaptive patches.

        Args:
            pixel_values: (B, C, H, W), or a list of (C, H_i, W_i), normalised as the host expects; uint8 images are raw
                pixels and are normalised here. For SigLIP 2 also rows of patches with ``spatial_shapes``.
            layout: The layout of the images, from `layout`; by default it is computed.
            restore_grid: Return each token at every base cell that its patch covers, in the host's own shape.
            labels: (B,) classes, for hosts with a loss.
            arguments: Arguments of the host (``output_hidden_states``, ``input_ids``, ...), and ``keep``,
                ``thresholds`` and ``max_tokens`` for this call, instead of the model's own.

        Returns:
            What the host returns; the output of a tower itself is a `aptvit.hosts.transformers.TowerOutput`.

        Raises:
            ValueError: If the images do not fit the model, or attention maps are requested.
        """
        if pixel_values is None:
            raise ValueError("there are no pixel_values: for text alone call get_text_features, or the host itself")
        images = self._images(pixel_values, arguments.pop("spatial_shapes", None))
        arguments.pop("pixel_attention_mask", None)
        if labels is not None:
            arguments["labels"] = labels
        call: Any = {name: arguments.pop(name) for name in CallBudget.__annotations__ if name in arguments}
        output_hidden_states = arguments.get("output_hidden_states")
        features = self._features(
            images, layout, self._returns_hidden_states(output_hidden_states), restore_grid, **call
        )
        return self.adapter.vit(pixel_values=features, **arguments)

    def hidden_states(
        self,
        indices: Sequence[int],
        pixel_values: Images,
        layout: PatchLayout | None = None,
        **call: Unpack[CallBudget],
    ) -> tuple[list[Tensor], PatchLayout]:
        """Packed hidden states of some blocks; blocks after the last requested block do not run.

        Args:
            indices: 0 for the input of the first block, i for the output of the i-th block; negative from the end.
            pixel_values: As for `forward`.
            layout: As for `forward`.
            call: ``keep``, ``thresholds`` and ``max_tokens`` for this call.

        Returns:
            (T, D) states for each index, and the layout.

        Raises:
            ValueError: If an index does not exist, or the images do not fit the model.
        """
        count = len(self.adapter.blocks) + 1
        numbers = [index + count if index < 0 else index for index in indices]
        if not numbers or min(numbers) < 0 or max(numbers) >= count:
            raise ValueError(f"hidden states {list(indices)} do not exist: a tower of {count - 1} blocks has {count}")
        tokens, layout = self.embed(pixel_values, layout, **call)
        request, intermediates = Request(tuple(index - 1 for index in numbers if index), max(numbers)), {}
        if any(numbers):
            intermediates = self.packed_encoder(tokens, layout, request).intermediates
        return [(tokens.x if index == 0 else intermediates[index - 1])[0] for index in numbers], layout

    def embed(
        self, images: Images, layout: PatchLayout | None = None, **call: Unpack[CallBudget]
    ) -> tuple[Tokens, PatchLayout]:
        # Blocks with checkpointing of their own would be recomputed outside of run_block, with unpacked attention.
        if release_checkpointing(self.adapter.blocks):
            self.set_grad_checkpointing()
        return super().embed(images, layout, **call)

    def _returns_hidden_states(self, output_hidden_states: Any) -> bool:
        if output_hidden_states is None:
            return bool(getattr(self.adapter.core.config, "output_hidden_states", False))
        return output_hidden_states is not False

    def _features(
        self,
        images: Images,
        layout: PatchLayout | None,
        with_hidden_states: bool,
        restore_grid: bool = False,
        **call: Unpack[CallBudget],
    ) -> _Features:
        tokens, layout = self.embed(images, layout, **call)
        request = Request(tuple(range(len(self.adapter.blocks)))) if with_hidden_states else Request()
        outputs = self.packed_encoder(tokens, layout, request)
        states = tuple(x[0] for x in (tokens.x, *outputs.intermediates.values())) if with_hidden_states else None
        return _Features(self.adapter.norm(outputs.x)[0], layout, states, restore_grid)

    def _tower_forward(
        self,
        pixel_values: Any,
        output_hidden_states: Any = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        bool_masked_pos: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Replaces the tower's forward."""
        if output_attentions:
            raise ValueError("output_attentions=True: attention maps are not computed here; call the host for them")
        if bool_masked_pos is not None:
            raise ValueError("bool_masked_pos names patches of a full grid: mask images with the host itself")
        features = pixel_values
        if not isinstance(features, PackedFeatures):
            images = self._images(pixel_values, spatial_shapes)
            features = self._features(images, None, self._returns_hidden_states(output_hidden_states))
        grid = getattr(features, "restore_grid", False)
        states = getattr(features, "hidden_states", None)
        hidden: Any = None if states is None else tuple(_as_rows(x, features.layout, grid) for x in states)
        last: Any
        if self.adapter.classifier is not None:  # it reads prefix tokens, and the mean of the patch tokens
            last = self.adapter.summary(features)
        else:
            last = _as_rows(features.tokens, features.layout, grid)
        output = TowerOutput(
            last_hidden_state=last,
            pooler_output=self.adapter.pool(features),
            hidden_states=hidden,
            layout=features.layout,
        )
        return output.to_tuple() if return_dict is False else output

    def _images(self, pixel_values: Images, spatial_shapes: Tensor | None) -> Images:
        """SigLIP 2's rows of patches as images; other inputs unchanged."""
        if spatial_shapes is None or not isinstance(pixel_values, Tensor) or pixel_values.ndim != 3:
            return pixel_values
        side, channels = self.patch_size, self.adapter.in_chans
        images = []
        for rows, (height, width) in zip(pixel_values, spatial_shapes.tolist(), strict=True):
            cells = rows[: height * width].view(height, width, side, side, channels)
            images.append(cells.permute(4, 0, 2, 1, 3).reshape(channels, height * side, width * side))
        return images

    # timm's protocol

    def get_classifier(self) -> Any:
        """The host's classifier; an identity if it has none."""
        return nn.Identity() if self.adapter.classifier is None else self.adapter.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: Number of classes of the new classifier.
            global_pool: Not used; the pooling stays the host's.

        Raises:
            ValueError: If the host is not a model for classification.
        """
        vit = self.adapter.vit
        if not hasattr(vit, "classifier"):
            raise ValueError(f"{type(vit).__name__} has no classifier: adapt a ...ForImageClassification model")
        width = vit.classifier.in_features
        vit.classifier = nn.Linear(width, num_classes, device=self.adapter.device, dtype=self.adapter.dtype)
        vit.config.num_labels = vit.num_labels = num_classes

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: tokens and positions."""
        return self.adapter.no_weight_decay()

    # transformers' protocol

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """As `set_grad_checkpointing`, under the name that trainers of transformers call."""
        self.set_grad_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """As ``set_grad_checkpointing(False)``."""
        self.set_grad_checkpointing(False)

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.20
    gradient_checkpointing_disable = activation_checkpointing_disable

    def __getattr__(self, name: str) -> Any:
        adapter = self.__dict__.get("adapter")
        if adapter is not None and name in HOST_ATTRIBUTES:
            return getattr(adapter, name)
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if adapter is None or name.startswith("_"):
                raise
            return getattr(adapter.vit, name)


def _as_rows(tokens: Tensor, layout: PatchLayout, restore_grid: bool) -> Tensor | list[Tensor]:
    """(T, D) -> (B, L, D) if all images have the same length, else a list of (L_i, D)."""
    features = PackedFeatures(tokens, layout)
    if restore_grid:
        maps, prefix = features.feature_maps(), features.prefix()
        if isinstance(maps, Tensor):
            return torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)
        return [
            torch.cat([prefix_tokens, image_map.flatten(1).T])
            for prefix_tokens, image_map in zip(prefix, maps, strict=True)
        ]
    return layout.packing.to_batch(tokens) if layout.packing.is_dense else features.split()
