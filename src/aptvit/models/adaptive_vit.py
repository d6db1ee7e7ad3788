"""From images to logits in five calls: read, patchify, embed, blocks, head.

groups = read(images)               images by size, checked             aptvit.patching.images
layout = patchify(groups)           scores, scales, `PatchLayout`       aptvit.patching.patchifier
tokens = embed(groups, layout)      (1, T, D) packed, with positions    aptvit.encoder.encoder, aptvit.layers
outputs = blocks(tokens, layout)    the host's own                      aptvit.encoder.encoder
logits = head(features)             the host's own                      aptvit.hosts
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor

from aptvit.encoder.encoder import ALL_BLOCKS, BlockOutputs, Request, Tokens
from aptvit.models.base import AdaptiveModel
from aptvit.patching.budget import Budget, CallBudget
from aptvit.patching.features import PackedFeatures
from aptvit.patching.images import ImageGroup, Images
from aptvit.patching.layout import PatchLayout
from aptvit.patching.layouts import check_layout

__all__ = ["AdaptivePatchTransformer"]


class AdaptivePatchTransformer(
    AdaptiveModel,
    ModelHubMixin,
    library_name="aptvit",
    tags=["vision-transformer", "adaptive-patches"],
    license="apache-2.0",
):
    """A Vision Transformer that reads smooth regions in big patches and busy regions in small ones.

    It has the host's parameters under the host's names, and timm's protocol. How many tokens an image costs is decided
    either by ``thresholds`` (section 3.1: busy images keep more) or by ``keep`` (every image keeps the same share).

    Args:
        host: The pretrained model.
        thresholds: From fine to coarse: ``thresholds[i-1]`` belongs to patches of 2^i x 2^i base patches, which are
            kept coarse where their score is strictly below it. Negative thresholds merge nothing.
        keep: Instead of thresholds: the share of its patch tokens that every image keeps.
        scales: Patch sizes, the base size included; with thresholds it follows from their number.
        scorer: ``"entropy"``, ``"laplacian"``, ``"upsample"``, one of `aptvit.scorers.SCORERS`, or a callable of the
            `aptvit.patching.scoring.Scorer` protocol.
        resize_only: Leave the sub-patch branch of Eq. 2 out: coarse patches are only resized, no parameter is added.
        init: How the sub-patch branch starts (Table 7b): ``"zero"``, ``"residual"`` or ``"nonzero"``.
        mean: Mean that the images were normalised with; by default the host's own, 0.5 if it has no configuration.
        std: Standard deviation that the images were normalised with; likewise.
        pad: Pad images at the right and bottom to multiples of the patch size instead of refusing them.
        attention: Attention backend, one of `aptvit.layers.kernels.attention_flash.available_backends`; by default the
            best one for the tensors at hand.
        token_bucket: Fill packed sequences up to a multiple of this many tokens, so that what is tuned or recorded for
            each shape (CUDA graphs, ``compile(dynamic=False)``) meets few of them. Images of equal length, as ``keep``
            makes them, are a plain batch and are not filled up.
        window_size: Side in base patches of windows that blocks attend inside of, a multiple of the largest patch;
            images must be whole windows (``pad`` fills them up). Prefix tokens are a window of their own.
        global_blocks: The blocks that attend to the whole image all the same, counted from 0.
        area_bias: Proportional attention: how much the logarithm of a patch's area adds to its logits as a key. At 1
            a patch weighs as much as the base patches that it replaces. 0.5 is better for detectors and segmenters
            (docs/results/dense.md), 0 for classifiers that were not trained with it.
        limits: ``blend``, ``min_keep``, ``max_tokens`` and ``max_batch_tokens``, see
            `aptvit.patching.budget.Budget`.

    Raises:
        ValueError: If the model cannot be adapted, or an option is out of range.
    """

    # Images to logits

    def forward(self, images: Images, layout: PatchLayout | None = None, **call: Unpack[CallBudget]) -> Any:
        """Classify images.

        Args:
            images: (B, C, H, W), or a list of (C, H_i, W_i), normalised as the host expects; uint8 images are raw
                pixels and are normalised here.
            layout: From `layout`, where it is there already: the images are not scored again.
            call: ``keep=``, ``thresholds=`` and ``max_tokens=`` of this call, instead of the model's own.

        Returns:
            What the host returns: (B, num_classes) logits.

        Raises:
            ValueError: If the images do not fit the model, or both a layout and a budget are given.
        """
        return self.forward_head(self.forward_features(images, layout, **call))

    def forward_features(
        self, images: Images, layout: PatchLayout | None = None, **call: Unpack[CallBudget]
    ) -> PackedFeatures:
        """Normalised tokens of the last block, packed, with their layout. Arguments as for `forward`."""
        outputs, layout = self.encode(images, layout, **call)
        return PackedFeatures(self.adapter.norm(outputs.x)[0], layout)

    def forward_head(self, features: PackedFeatures, pre_logits: bool = False) -> Any:
        """Pool the tokens of each image and classify.

        Args:
            features: From `forward_features`.
            pre_logits: Return the pooled features instead of logits.

        Returns:
            (B, num_classes), or (B, D) pooled features.
        """
        return self.adapter.forward_head(features, pre_logits)

    def encode(
        self,
        images: Images,
        layout: PatchLayout | None = None,
        request: Request = ALL_BLOCKS,
        **call: Unpack[CallBudget],
    ) -> tuple[BlockOutputs, PatchLayout]:
        """Run embedding and blocks.

        Args:
            images: As for `forward`.
            layout: As for `forward`.
            request: What is wanted of the blocks, besides the output of the last.
            call: As for `forward`.
        """
        tokens, layout = self.embed(images, layout, **call)
        return self.packed_encoder(tokens, layout, request), layout

    @torch.compiler.disable  # gathers by data-dependent indices: nothing that a compiler could help with
    def embed(
        self, images: Images, layout: PatchLayout | None = None, **call: Unpack[CallBudget]
    ) -> tuple[Tokens, PatchLayout]:
        """What the first block reads, and the layout of it. Arguments as for `forward`."""
        groups, budget, waits = self.patchifier.groups(images), self._budget(call), layout is None
        directly = torch.is_grad_enabled() or self.training
        check = None if directly else self.packed_encoder.derived.check()  # on a GPU answered by the layout's one wait
        if layout is None:
            layout = self.patchifier(groups, budget, self._learns)
        elif any(value is not None for value in call.values()):
            raise ValueError(f"a layout decides already which patches there are: leave {', '.join(call)} or it out")
        else:
            check_layout(layout, groups, self.patchifier)
            layout = self.patchifier.with_cache(layout, groups, self._learns)
        derived = None if check is None else self.packed_encoder.derived.fresh(check, waits)
        tokens = self.packed_encoder.embed(groups, layout, derived)
        return Tokens(self.adapter.before_blocks(tokens.x), tokens.rotation), layout

    # Which patches

    @torch.compiler.disable
    def layout(self, images: Images, learn: bool = False, **call: Unpack[CallBudget]) -> PatchLayout:
        """Which patches these images are cut into. Waits for the device once.

        Args:
            images: As for `forward`.
            learn: For one step of training: what a scorer computes with the blocks is learned with all else, and not
                computed again.
            call: As for `forward`.
        """
        return self.patchifier(self.patchifier.groups(images), self._budget(call), learn and self._learns)

    def scores(self, images: Images) -> list[tuple[ImageGroup, Mapping[int, Tensor]]]:
        """Scores of every candidate patch, for each group of images of one size."""
        return self.patchifier.scores(images)

    def _budget(self, call: CallBudget) -> Budget:
        return self.patchifier.budget.for_call(**call) if call else self.patchifier.budget

    @property
    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled()
