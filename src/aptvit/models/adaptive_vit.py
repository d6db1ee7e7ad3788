"""From images to logits in five calls: read, patchify, embed, blocks, head.

groups = read(images)               images by size, checked             aptvit.patching.images
layout = patchify(groups)           scores, scales, `PatchLayout`       aptvit.patching.patchifier
tokens = embed(groups, layout)      (1, T, D) packed, with positions    aptvit.encoder.encoder, aptvit.layers
outputs = blocks(tokens, layout)    the host's own                      aptvit.encoder.encoder
logits = head(features)             the host's own                      aptvit.hosts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, Unpack, cast

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from aptvit.encoder.encoder import ALL_BLOCKS, BlockOutputs, Request, Tokens
from aptvit.models.base import AdaptiveModel
from aptvit.patching.budget import Budget, CallBudget
from aptvit.patching.features import PackedFeatures
from aptvit.patching.images import ImageGroup, Images
from aptvit.patching.layout import PatchLayout
from aptvit.patching.layouts import check_layout
from aptvit.patching.selection import needs_scores

__all__ = ["AdaptivePatchTransformer", "not_compiled"]

Method = TypeVar("Method", bound=Callable[..., Any])


def not_compiled(method: Method) -> Method:
    """As ``torch.compiler.disable``, but a plain call where nothing is compiled.

    The wrapper of PyTorch writes to a global while any thread records a graph, and fails where two threads do.
    """
    disabled = torch.compiler.disable(method)

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled if torch.compiler.is_dynamo_compiling() else method)(*args, **kwargs)

    return cast(Method, call)


class AdaptivePatchTransformer(
    AdaptiveModel,
    ModelHubMixin,
    library_name="aptvit",
    tags=["vision-transformer", "adaptive-patches"],
    license="apache-2.0",
):
    """A Vision Transformer that reads smooth regions in large patches and busy regions in small patches.

    It has the host's parameters under the host's names, and timm's protocol. The number of tokens of an image follows
    either from ``thresholds`` (section 3.1: busy images keep more) or from ``keep`` (every image keeps the same share).

    Args:
        host: The pretrained model.
        thresholds: From fine to coarse: ``thresholds[i-1]`` belongs to patches of 2^i x 2^i base patches, which are
            kept coarse where their score is strictly below it. Negative thresholds merge nothing.
        keep: Instead of thresholds: the share of its patch tokens that every image keeps.
        scales: Number of patch sizes, the base size included; follows from the number of thresholds. 2 by default.
        scorer: ``"entropy"``, ``"laplacian"``, ``"upsample"``, ``"exact"``, one of `aptvit.scorers.SCORERS`, or a
            callable of the `aptvit.patching.scoring.Scorer` protocol.
        resize_only: Omit the sub-patch branch of Eq. 2: coarse patches are only resized, no parameter is added.
        init: Initialisation of the sub-patch branch (Table 7b): ``"zero"``, ``"residual"`` or ``"nonzero"``.
        mean: Mean that images are normalised with, of pixels in [0, 1]; by default that of the host's configuration,
            0.5 if it has none for so many channels.
        std: Standard deviation that images are normalised with, of pixels in [0, 1]; by default as ``mean``.
        pad: Pad images at the right and bottom to multiples of the patch size instead of refusing them.
        attention: Attention backend, one of `aptvit.layers.kernels.attention_flash.available_backends`; by default the
            best backend for the tensors.
        token_bucket: Pad packed sequences to a multiple of this many tokens, so that CUDA graphs and
            ``compile(dynamic=False)`` meet few shapes. Images of equal length, as with ``keep``, are a plain batch and
            are not padded.
        window_size: Side in base patches of windows that blocks attend inside of, a multiple of the largest patch;
            images must be whole windows (see ``pad``). The prefix tokens of an image are a separate window.
        global_blocks: Blocks that attend to the whole image although there are windows, counted from 0.
        area_bias: Proportional attention: factor of the logarithm of a patch's area that is added to its logits as a
            key. At 1 a patch weighs as much as the base patches that it replaces. 0.5 is better for detectors and
            segmenters (docs/results/dense.md), 0 for classifiers that were not trained with it.
        reading: How a coarse patch is read: ``"resized"`` by Eq. 2, or ``"corner"`` as the base patch in its lower
            right corner, without the sub-patch branch (docs/explain/scorers.md).
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
            layout: The layout of the images, from `layout`; by default it is computed.
            call: ``keep=``, ``thresholds=`` and ``max_tokens=`` for this call, instead of the model's own.

        Returns:
            What the host returns: (B, num_classes) logits.

        Raises:
            ValueError: If the images do not fit the model, or both a layout and a budget are given.
        """
        return self.forward_head(self.forward_features(images, layout, **call))

    def forward_features(
        self, images: Images, layout: PatchLayout | None = None, **call: Unpack[CallBudget]
    ) -> PackedFeatures:
        """Normalised (T, D) tokens of the last block, packed, with their layout.

        Arguments and errors as for `forward`.
        """
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
            request: Which blocks to run, and what to return besides the output of the last.
            call: As for `forward`.

        Returns:
            Outputs of the blocks, (1, T, D) each, and the layout.

        Raises:
            ValueError: As for `forward`.
        """
        tokens, layout = self.embed(images, layout, **call)
        return self.packed_encoder(tokens, layout, request), layout

    @not_compiled  # gathers by data-dependent indices, which compilation does not speed up
    def embed(
        self, images: Images, layout: PatchLayout | None = None, **call: Unpack[CallBudget]
    ) -> tuple[Tokens, PatchLayout]:
        """The (1, T, D) input of the first block, and its layout. Arguments and errors as for `forward`."""
        groups, budget, waits = self._groups(images), self._budget(call), layout is None
        directly = torch.is_grad_enabled() or self.training
        merges = needs_scores(budget) if layout is None else not layout.is_uniform  # otherwise no affine map is used
        # Read after the layout's synchronisation.
        check = None if directly else self.packed_encoder.derived.check(merges)
        if layout is None:
            layout = self.patchifier(groups, budget, self._records_gradients)
        elif any(value is not None for value in call.values()):
            raise ValueError(f"a layout fixes the number of tokens: give either layout= or {', '.join(call)}")
        else:
            check_layout(layout, groups, self.patchifier)
            layout = self.patchifier.with_cache(layout, groups, self._records_gradients)
        derived = None if check is None else self.packed_encoder.derived.fresh(check, waits)
        tokens = self.packed_encoder.embed(groups, layout, derived)
        return Tokens(self.adapter.before_blocks(tokens.x), tokens.rotation), layout

    # Which patches

    @not_compiled
    def layout(self, images: Images, learn: bool = False, **call: Unpack[CallBudget]) -> PatchLayout:
        """The patches of images. Synchronises with the device once.

        Args:
            images: As for `forward`.
            learn: For one step of training: record gradients in scorers that run the blocks, and reuse their results.
            call: As for `forward`.

        Raises:
            ValueError: If the images do not fit the model, or the budget cannot be met.
        """
        return self.patchifier(self._groups(images), self._budget(call), learn and self._records_gradients)

    def scores(self, images: Images) -> list[tuple[ImageGroup, Mapping[int, Tensor]]]:
        """Scores of all candidate patches.

        Args:
            images: As for `forward`.

        Returns:
            For each group of b images of one size, the group and for factor 2^i (b, h // 2^i, w // 2^i) scores.

        Raises:
            ValueError: If the images do not fit the model.
        """
        return self.patchifier.scores(images)

    def _groups(self, images: Images) -> list[ImageGroup]:
        # That a graph is recorded is true in all threads; the one that records is in a mode.
        in_a_mode = torch.compiler.is_dynamo_compiling() or _len_torch_dispatch_stack() > 0
        is_usual = len(images) and not ((in_a_mode and self._is_recorded()) or torch.jit.is_tracing())
        return self.patchifier.groups(images if is_usual else self._unusual_batch(images))

    def _budget(self, call: CallBudget) -> Budget:
        return self.patchifier.budget.for_call(**call) if call else self.patchifier.budget

    @property
    def _records_gradients(self) -> bool:
        return self.training and torch.is_grad_enabled()
