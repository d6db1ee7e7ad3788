"""The five stages, read top to bottom: scoring, layout, embedding, blocks, restore.

images ── scores ── layout ── (T, D) tokens ── the host's own blocks ── pooled rows, or maps of features
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from aptvit.encoder.blocks import BlockStack, check_global_blocks, take_indices
from aptvit.encoder.clips import run_clip
from aptvit.encoder.tokens import Rotation, TokenEmbedding
from aptvit.hosts import Adapter, get_adapter, is_of_transformers
from aptvit.hosts.adapter import HOST_ATTRIBUTES, share_registries
from aptvit.layers.attention import Backend
from aptvit.layers.cuda_graphs import BlockGraphs
from aptvit.layers.features import PackedFeatures
from aptvit.layers.patch_embed import COARSE_PREFIX, CoarsePatchEmbed, Init
from aptvit.models.checkpoints import load, save
from aptvit.patching.images import ImageGroup, Images
from aptvit.patching.layout import PatchLayout
from aptvit.patching.patchifier import Patchifier
from aptvit.patching.scoring import Scorer
from aptvit.patching.selection import Budget
from aptvit.scorers.embedding import EmbeddingScorer
from aptvit.scorers.glance import GLANCE, ForeseeingScorer, Glance, GlanceScorer
from aptvit.scorers.preview import PreviewScorer
from aptvit.scorers.spread import SpreadScorer

__all__ = ["AdaptivePatchTransformer", "adapt", "from_pretrained"]


def adapt(host: nn.Module, **options: Any) -> AdaptivePatchTransformer:
    """Turn a pretrained Vision Transformer into an adaptive one.

    The host's weights are shared, not copied, and the host itself stays as it is. With nothing merged the result is
    the host model, to rounding.

    Args:
        host: A timm VisionTransformer, DeiT or Eva, or a vision tower of transformers (docs/towers.md).
        options: As for `AdaptivePatchTransformer`: ``thresholds=(5.5, 4.0)`` or ``keep=0.5``, ``scorer="entropy"``, ...
            For models of transformers also ``processor``, see `aptvit.models.tower.AdaptiveTower`.

    Raises:
        ValueError: If the model cannot be adapted, or an option is out of range.
    """
    return adaptive_class(is_of_transformers(host))(host, **options)


def adaptive_class(of_transformers: bool) -> type[AdaptivePatchTransformer]:
    """The class of adaptive models whose hosts are from timm, or from transformers."""
    if not of_transformers:
        return AdaptivePatchTransformer
    from aptvit.models.tower import AdaptiveTower

    return AdaptiveTower


def from_pretrained(folder_or_hub_id: str | Path, **options: Any) -> AdaptivePatchTransformer:
    """Load a model that ``model.save_pretrained`` wrote: weights, thresholds, scorer and all.

    Args:
        folder_or_hub_id: A folder, or the name of a repository on the hub.
        options: As for ``huggingface_hub.snapshot_download``: ``revision``, ``token``, ``cache_dir``, ...

    Raises:
        ValueError: If the folder does not hold such a model.
    """
    return load(AdaptivePatchTransformer, str(folder_or_hub_id), **options)


class AdaptivePatchTransformer(
    nn.Module,
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
        scorer: ``"entropy"``, ``"laplacian"``, ``"upsample"``, ``"embedding"`` (in the host's own embedding space),
            ``"glance"`` (what the host will look at, see `aptvit.fit_glance`), ``"spread"`` (where what a
            detector or segmenter says differs, see `aptvit.fit_spread`), ``"preview"`` (the same, from reading all
            in 2x patches first, see `aptvit.scorers.preview`) or a callable of the `aptvit.patching.scoring.Scorer` protocol.
        resize_only: Leave the sub-patch branch of Eq. 2 out: coarse patches are only resized, no parameter is added.
        init: How the sub-patch branch starts (Table 7b): ``"zero"``, ``"residual"`` or ``"nonzero"``.
        mean: Mean that the images were normalised with; by default the host's own, 0.5 if it has no configuration.
        std: Standard deviation that the images were normalised with; likewise.
        pad: Pad images at the right and bottom to multiples of the patch size instead of refusing them.
        attention: Attention backend, one of `aptvit.layers.attention.available_backends`; by default the best one for the
            tensors at hand.
        token_bucket: Fill packed sequences up to a multiple of this many tokens, so that what is tuned or recorded for
            each shape (CUDA graphs, ``compile(dynamic=False)``) meets few of them. Images of equal length, as ``keep``
            makes them, are a plain batch and are not filled up.
        blend: With ``thresholds`` and ``keep``: each image's number of tokens lies between what the two give it, at 0
            that of the thresholds, at 1 that of the share. `aptvit.calibrate` finds both.
        min_keep: Share of its patch tokens that no image falls below.
        max_tokens: Tokens that no image exceeds, prefix tokens included.
        max_batch_tokens: Tokens that no batch exceeds, prefix tokens included.
        window_size: Side in base patches of windows that blocks attend inside of, a multiple of the largest patch;
            images must be whole windows (``pad`` fills them up). Prefix tokens are a window of their own.
        global_blocks: The blocks that attend to the whole image all the same, counted from 0.
        area_bias: Proportional attention: how much the logarithm of a patch's area adds to its logits as a key. At 1
            a patch weighs as much as the base patches that it replaces. 0.5 is better for detectors and segmenters
            (docs/dense-measured.md), 0 for classifiers that were not trained with it.

    Raises:
        ValueError: If the model cannot be adapted, or an option is out of range.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        thresholds: float | Sequence[float] | None = None,
        keep: float | None = None,
        scales: int | None = None,
        scorer: str | Scorer = "entropy",
        resize_only: bool = False,
        init: Init = "zero",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pad: bool = False,
        attention: Backend | None = None,
        token_bucket: int | None = None,
        blend: float | None = None,
        min_keep: float = 0.0,
        max_tokens: int | None = None,
        max_batch_tokens: int | None = None,
        window_size: int | None = None,
        global_blocks: Sequence[int] = (),
        area_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.adapter: Adapter = get_adapter(host)
        share_registries(self.adapter.vit, self)
        weight, _ = self.adapter.patch_weight()
        if not resize_only:
            embed = CoarsePatchEmbed(self.adapter.embed_dim, init, device=weight.device, dtype=weight.dtype)
            self.add_module(COARSE_PREFIX, embed)
        self.resize_only = resize_only
        everywhere = check_global_blocks(global_blocks, window_size, len(self.adapter.blocks))
        self._blocks = BlockStack(self.adapter, attention, token_bucket, everywhere, area_bias)
        self.patchifier = Patchifier(
            self.adapter.patch_size,
            self.adapter.in_chans,
            thresholds=thresholds,
            keep=keep,
            scales=scales,
            scorer=self._scorer(scorer),
            mean=self.adapter.mean if mean is None else mean,
            std=self.adapter.std if std is None else std,
            pad=pad,
            cut_size=self.adapter.cut_size,
            num_prefix_tokens=self.adapter.num_prefix_tokens,
            blend=blend,
            min_keep=min_keep,
            max_tokens=max_tokens,
            max_batch_tokens=max_batch_tokens,
            window_size=window_size,
        )
        if isinstance(self.patchifier.scorer, PreviewScorer):
            self.patchifier.scorer.check_scales(self.num_scales)
        self._tokens = TokenEmbedding(self.adapter, self.patchifier)
        self.train(host.training)

    def _scorer(self, scorer: str | Scorer) -> str | Scorer:
        """Scorers that look through the host's eyes are made here."""
        if scorer == EmbeddingScorer.name:
            return EmbeddingScorer(self.adapter.patch_weight)
        if scorer == PreviewScorer.name:
            return PreviewScorer(self)
        if scorer in (GlanceScorer.name, SpreadScorer.name):
            kind: type[ForeseeingScorer] = GlanceScorer if scorer == GlanceScorer.name else SpreadScorer
            glance = Glance(self.adapter.embed_dim, kind.outputs, kind.reach)
            self.add_module(GLANCE, glance.to(self.adapter.patch_weight()[0].device))
            return kind(self)
        return scorer

    # Which patches: see aptvit.patching.patchifier

    @property
    def budget(self) -> Budget:
        """Thresholds, share and limits together. Can be set at any time."""
        return self.patchifier.budget

    @budget.setter
    def budget(self, value: Budget) -> None:
        self.patchifier.budget = value

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Thresholds from fine to coarse; None while ``keep`` alone decides. Can be set at any time."""
        return self.patchifier.thresholds

    @thresholds.setter
    def thresholds(self, value: float | Sequence[float]) -> None:
        self.patchifier.thresholds = value

    @property
    def keep(self) -> float | None:
        """Share of its patch tokens that every image keeps; None while thresholds decide. Can be set at any time."""
        return self.patchifier.keep

    @keep.setter
    def keep(self, value: float) -> None:
        self.patchifier.keep = value

    @property
    def token_bucket(self) -> int | None:
        """Packed sequences are filled up to a multiple of this many tokens; None leaves them as they are."""
        return self._blocks.token_bucket

    @token_bucket.setter
    def token_bucket(self, value: int | None) -> None:
        self._blocks.token_bucket = value

    @property
    def attention(self) -> Backend | None:
        """Attention backend; None for the best one for the tensors at hand. Can be set at any time."""
        return self._blocks.attention

    @attention.setter
    def attention(self, value: Backend | None) -> None:
        self._blocks.attention = value

    @property
    def area_bias(self) -> float:
        """How much the logarithm of a patch's area adds to its logits as a key. Can be set at any time."""
        return self._blocks.area_bias

    @area_bias.setter
    def area_bias(self, value: float) -> None:
        self._blocks.area_bias = value

    @property
    def window_size(self) -> int | None:
        """Side in base patches of the windows that blocks attend inside of; None without windows."""
        return self.patchifier.window_size

    @property
    def global_blocks(self) -> frozenset[int]:
        """Blocks that attend to the whole image although there are windows."""
        return self._blocks.global_blocks

    @property
    def num_scales(self) -> int:
        """Number of patch sizes, the base size included."""
        return self.patchifier.num_scales

    @property
    def patch_size(self) -> int:
        """Side of a base patch in pixels."""
        return self.patchifier.patch_size

    def layout(self, images: Images, learn: bool = False) -> PatchLayout:
        """Which patches these images are cut into. Waits for the device once.

        Args:
            images: As for `forward`.
            learn: For one step of training: where a preview decides, what it computed is learned with the rest, and not
                computed again.
        """
        return self.patchifier.layout(self.patchifier.groups(images), learn and self._learns)

    def scores(self, images: Images) -> list[tuple[ImageGroup, dict[int, Tensor]]]:
        """Scores of every candidate patch, for each group of images of one size."""
        return self.patchifier.scores(images)

    # The five stages

    def forward(self, images: Images, layout: PatchLayout | None = None) -> Any:
        """Classify images.

        Args:
            images: (B, C, H, W), or a list of (C, H_i, W_i), normalised as the host expects; uint8 images are raw
                pixels and are normalised here.
            layout: From `layout`, where it is known already: the images are not scored again.

        Returns:
            What the host returns: (B, num_classes) logits.

        Raises:
            ValueError: If the images do not fit the model.
        """
        return self.forward_head(self.forward_features(images, layout))

    def forward_video(self, frames: Tensor, tolerance: float = 2.0) -> Any:
        """Classify the frames of a clip; what did not change since it was last read is not read again.

        For inference. With a tolerance below 0 nothing is reused, and each frame is what `forward` makes of it; frames
        that are all the same give the same answer. `aptvit.encoder.clips.run_clip` gives features, and what was read.

        Args:
            frames: (T, C, H, W) in the order of time.
            tolerance: Mean absolute change of a base patch's pixels, on the scale of 0 to 255, up to which it counts as
                unchanged.

        Returns:
            What the host returns for images: (T, num_classes) logits.

        Raises:
            ValueError: If the frames are no clip, or the model has windows or is in training mode.
        """
        return self.forward_head(run_clip(self, frames, tolerance)[0])

    def forward_features(self, images: Images, layout: PatchLayout | None = None) -> PackedFeatures:
        """Normalised tokens of the last block, packed, with their layout. Arguments as for `forward`."""
        x, layout = self._run_blocks(images, layout, {}, None)
        return PackedFeatures(self.adapter.norm(x)[0], layout)

    def forward_head(self, features: PackedFeatures, pre_logits: bool = False) -> Any:
        """Pool the tokens of each image and classify.

        Args:
            features: From `forward_features`.
            pre_logits: Return the pooled features instead of logits.
        """
        return self.adapter.forward_head(features, pre_logits)

    def forward_intermediates(
        self,
        images: Images,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        layout: PatchLayout | None = None,
    ) -> Any:
        """Feature maps of several blocks, each token at every base cell that its patch covers.

        Args:
            images: As for `forward`.
            indices: The last n blocks if a number, these blocks if a sequence, all if None.
            return_prefix_tokens: Return (map, prefix tokens) pairs.
            norm: Apply the final normalisation to each map.
            stop_early: Skip the blocks after the last one asked for.
            output_fmt: ``"NCHW"`` for maps (B, D, H/p, W/p), ``"NLC"`` for (B, (H/p) (W/p), D).
            intermediates_only: Return only the maps.
            layout: As for `forward`.

        Returns:
            The maps, or (`PackedFeatures` of the last block run, maps). Where images differ in size, each map is a
            list of (D, h_i, w_i), or (h_i w_i, D).

        Raises:
            ValueError: If the format or an index does not exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NLC'")
        taken: dict[int, Tensor | None] = dict.fromkeys(take_indices(indices, len(self.adapter.blocks)))
        x, layout = self._run_blocks(images, layout, taken, max(taken) + 1 if stop_early else None)
        maps = []
        for tokens in taken.values():
            assert tokens is not None
            features = PackedFeatures((self.adapter.norm(tokens) if norm else tokens)[0], layout)
            restored = features.feature_maps() if output_fmt == "NCHW" else features.rows()
            maps.append((restored, features.prefix()) if return_prefix_tokens else restored)
        if intermediates_only:
            return maps
        return PackedFeatures(self.adapter.norm(x)[0], layout), maps

    # Stage by stage

    def enter(self, images: Images, layout: PatchLayout | None = None) -> tuple[Tensor, Rotation | None, PatchLayout]:
        """What the first block reads: (1, T, D) packed tokens, their rotary embeddings if there are any, the layout.

        Arguments as for `forward`.
        """
        groups = self.patchifier.groups(images)
        if layout is None:
            layout = self.patchifier.layout(groups, self._learns)
        else:
            self.patchifier.check_layout(layout, groups)
        if not self._blocks.in_first_pass:
            layout = self.patchifier.with_first_pass(layout, groups, self._learns)
        x, rotation = self._embed(groups, layout)
        return self.adapter.before_blocks(x), rotation, layout

    @property
    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _run_blocks(
        self, images: Images, layout: PatchLayout | None, taken: dict[int, Tensor | None], stop: int | None
    ) -> tuple[Tensor, PatchLayout]:
        """Tokens in, blocks. Fills ``taken`` with the outputs of those blocks. -> (1, T, D)"""
        x, rotation, layout = self.enter(images, layout)
        return self._blocks(x, rotation, layout, taken, stop), layout

    def _embed(self, groups: Sequence[ImageGroup], layout: PatchLayout) -> tuple[Tensor, Rotation | None]:
        """Tokens (1, T, D) in packed order, and their rotary embeddings."""
        return self._tokens(groups, layout, getattr(self, COARSE_PREFIX, None))

    # timm's protocol

    def get_classifier(self) -> Any:
        """The host's classifier."""
        return self.adapter.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one."""
        self.adapter.vit.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The host's layer groups; new parameters belong to the stem."""
        return self.adapter.group_matcher(coarse)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the host exempts from weight decay."""
        return self.adapter.vit.no_weight_decay()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping its activations."""
        self._blocks.grad_checkpointing = enable

    def __getattr__(self, name: str) -> Any:
        if name in HOST_ATTRIBUTES:
            return getattr(self.adapter.vit, name)
        return super().__getattr__(name)

    # nn.Module

    def train(self, mode: bool = True) -> AdaptivePatchTransformer:
        super().train(mode)
        self.adapter.vit.training = mode
        self._forget()  # weights changed behind autograd's back (p.data) are seen at the latest here
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> AdaptivePatchTransformer:
        super()._apply(*args, **kwargs)
        self._forget()
        return self

    def _forget(self) -> None:
        """Forget what was computed from, or recorded with, parameters."""
        self._tokens.clear()
        self._blocks.clear()

    def use_cuda_graphs(self, enable: bool = True, token_bucket: int = 256) -> None:
        """Launch all blocks at once in inference on a GPU: for small batches, where launching is what takes the time.

        A graph is recorded for each batch size, each multiple of ``token_bucket`` tokens and each choice of maps that
        occurs. Packed sequences need the ``varlen`` or ``flash_attn`` backend, which is to say half precision; images
        of equal length (``keep``) do not. Elsewhere blocks run as they did. Graphs read the parameters where they are:
        call this again if a parameter is replaced by other means than ``.to()`` or ``.train()``.

        Args:
            enable: False to stop.
            token_bucket: Tokens that lengths are filled up to a multiple of.
        """
        self._blocks.graphs = BlockGraphs() if enable else None
        self.token_bucket = token_bucket if enable else None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks, where the time goes; takes the arguments of ``torch.compile``.

        All blocks share one graph, and it serves every number of tokens.
        """
        self._blocks.compile(*args, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> AdaptivePatchTransformer:
        return load(cls, model_id, **options)
