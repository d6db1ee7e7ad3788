"""Base of adaptive models: options, settings, timm's protocol and files; the forward is in `adaptive_vit`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn

from aptvit.encoder.buckets import GraphedBlocks, TokenBucket
from aptvit.encoder.clips import run_clip
from aptvit.encoder.encoder import BlockOutputs, Encoder, Request
from aptvit.encoder.readings import Reading, read_at_corner
from aptvit.hosts import get_adapter
from aptvit.hosts.adapter import HOST_ATTRIBUTES, Adapter, share_registries
from aptvit.hosts.pretrained import class_names, set_class_names
from aptvit.layers.patch_embed import COARSE_PREFIX, CoarsePatchEmbed, Init
from aptvit.models.checkpoints import find_folder, load, save
from aptvit.models.settings import BudgetSettings
from aptvit.patching.budget import CallBudget
from aptvit.patching.features import PackedFeatures
from aptvit.patching.images import Images, Normalization
from aptvit.patching.layout import PatchLayout
from aptvit.patching.patchifier import Patchifier
from aptvit.patching.scoring import Scorer
from aptvit.scorers import make_scorer

__all__ = ["AdaptiveModel", "take_indices"]


class AdaptiveModel(BudgetSettings, nn.Module):
    """Base of `aptvit.AdaptivePatchTransformer`, which documents the options.

    Settings can be changed at any time; a call reads them once, at its start.

    Attributes:
        adapter: The host's adapter.
        packed_encoder: Runs the host's embedding and blocks on packed tokens.
        patchifier: Cuts images into patches.
        resize_only: Whether the sub-patch branch of Eq. 2 is omitted.
    """

    if TYPE_CHECKING:  # at run time timm's attributes are looked up in __getattr__
        num_prefix_tokens: int
        embed_dim: int
        num_classes: int
        encode: Callable[..., tuple[BlockOutputs, PatchLayout]]

    host_library: ClassVar[str] = "timm"
    _is_recorded = staticmethod(torch.compiler.is_exporting)

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
        attention: str | None = None,
        token_bucket: int | None = None,
        window_size: int | None = None,
        global_blocks: Sequence[int] = (),
        area_bias: float = 0.0,
        reading: Reading = "resized",
        **limits: Any,
    ) -> None:
        super().__init__()
        self.adapter: Adapter = get_adapter(host)
        share_registries(self.adapter.vit, self)
        if reading not in ("resized", "corner"):
            raise ValueError(f"reading={reading!r} is unknown: use 'resized', the paper's, or 'corner'")
        self.resize_only = resize_only = resize_only or reading != "resized"  # the branch reads all base patches
        if not resize_only:
            embed = CoarsePatchEmbed(self.adapter.embed_dim, init, self.adapter.device, self.adapter.dtype)
            self.add_module(COARSE_PREFIX, embed)
        not_windowed = check_global_blocks(global_blocks, window_size, len(self.adapter.blocks))
        channels = self.adapter.in_chans
        mean, std = (  # a host with other channels than its published weights has no statistics
            values if values is not None else of_host if len(of_host) == channels else (0.5,)
            for values, of_host in ((mean, self.adapter.mean), (std, self.adapter.std))
        )
        normalization = Normalization.of_channels(mean, std, channels)
        self.packed_encoder = Encoder(self.adapter, normalization, window_size, not_windowed)
        self.attention, self.token_bucket, self.area_bias = attention, token_bucket, area_bias
        self.packed_encoder.read_as = read_at_corner if reading == "corner" else None
        self.patchifier = Patchifier(
            self.adapter.patch_size,
            self.adapter.in_chans,
            thresholds=thresholds,
            keep=keep,
            scales=scales,
            scorer=make_scorer(scorer, self.packed_encoder),
            mean=normalization.mean,
            std=normalization.std,
            pad=pad,
            cut_size=self.adapter.cut_size,
            num_prefix_tokens=self.adapter.num_prefix_tokens,
            window_size=window_size,
            **limits,
        )
        check_scales = getattr(self.patchifier.scorer, "check_scales", None)
        if check_scales is not None:
            check_scales(self.num_scales)
        self.train(host.training)

    # Settings

    @property
    def token_bucket(self) -> int | None:
        """Packed sequences are padded to a multiple of this many tokens; None for no padding."""
        return None if self.packed_encoder.bucket is None else self.packed_encoder.bucket.multiple

    @token_bucket.setter
    def token_bucket(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise ValueError(f"token_bucket={value} must be at least 1: lengths are padded to a multiple of it")
        self.packed_encoder.bucket = None if value is None else TokenBucket(value)

    @property
    def attention(self) -> str | None:
        """Attention backend; None for the best backend for the tensors."""
        return self.packed_encoder.attention

    @attention.setter
    def attention(self, value: str | None) -> None:
        self.packed_encoder.attention = value

    @property
    def area_bias(self) -> float:
        """Factor of the logarithm of a patch's area that is added to its logits as a key."""
        return self.packed_encoder.area_bias

    @area_bias.setter
    def area_bias(self, value: float) -> None:
        if not 0 <= value < float("inf"):
            raise ValueError(f"area_bias={value} must be at least 0: 1 weighs a patch as the base patches it replaces")
        self.packed_encoder.area_bias = value

    @property
    def reading(self) -> Reading:
        """How coarse patches are read."""
        return "resized" if self.packed_encoder.read_as is None else "corner"

    @property
    def window_size(self) -> int | None:
        """Side in base patches of the windows that blocks attend inside of; None without windows."""
        return self.packed_encoder.window_size

    @property
    def global_blocks(self) -> frozenset[int]:
        """Blocks that attend to the whole image although there are windows."""
        return self.packed_encoder.global_blocks

    @property
    def class_names(self) -> list[str] | None:
        """A name for each class, in the order of the logits; None without names."""
        return class_names(self)

    @class_names.setter
    def class_names(self, names: Sequence[str]) -> None:
        set_class_names(self, names)

    # timm's protocol

    def get_classifier(self) -> Any:
        """The host's classifier."""
        return self.adapter.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: Number of classes of the new classifier.
            global_pool: timm's name of the pooling of tokens; by default unchanged.
        """
        self.adapter.vit.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The host's layer groups; new parameters belong to the stem."""
        return self.adapter.group_matcher(coarse)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the host exempts from weight decay."""
        return self.adapter.vit.no_weight_decay()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.packed_encoder.grad_checkpointing = enable

    def __getattr__(self, name: str) -> Any:
        if name in HOST_ATTRIBUTES:
            return getattr(self.adapter.vit, name)
        return super().__getattr__(name)

    # Feature maps

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
        **call: Unpack[CallBudget],
    ) -> Any:
        """Feature maps of several blocks on the base grid: each token at every cell that its patch covers.

        Args:
            images: As for `forward`.
            indices: The last n blocks if a number, these blocks if a sequence, all if None.
            return_prefix_tokens: Return pairs of a map and (B, P, D) prefix tokens.
            norm: Apply the final normalisation to each map.
            stop_early: Skip the blocks after the last requested block.
            output_fmt: ``"NCHW"`` for maps (B, D, H/p, W/p), ``"NLC"`` for (B, (H/p) (W/p), D).
            intermediates_only: Return only the maps.
            layout: As for `forward`.
            call: As for `forward`.

        Returns:
            The maps, or (`PackedFeatures` of the last block that ran, maps). If images differ in size, each map is a
            list of (D, h_i, w_i), or of (h_i w_i, D).

        Raises:
            ValueError: If the format or an index does not exist, or as for `forward`.
        """
        check_format(output_fmt)
        numbers = take_indices(indices, len(self.adapter.blocks))
        stop = max(numbers) + 1 if stop_early else None
        outputs, layout = self.encode(images, layout, Request(tuple(numbers), stop), **call)
        maps = self.feature_maps(outputs, layout, numbers, return_prefix_tokens, norm, output_fmt)
        return maps if intermediates_only else (PackedFeatures(self.adapter.norm(outputs.x)[0], layout), maps)

    def feature_maps(
        self,
        outputs: BlockOutputs,
        layout: PatchLayout,
        indices: Sequence[int],
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: str = "NCHW",
    ) -> list[Any]:
        """The maps of `forward_intermediates` from outputs of blocks.

        Args:
            outputs: From `encode`, with the outputs of these blocks.
            layout: The layout of the images.
            indices: Numbers of the blocks.
            return_prefix_tokens: As for `forward_intermediates`.
            norm: As for `forward_intermediates`.
            output_fmt: As for `forward_intermediates`.

        Returns:
            As `forward_intermediates`, without the features.

        Raises:
            ValueError: If the format does not exist.
        """
        check_format(output_fmt)
        maps: list[Any] = []
        for number in indices:
            x = outputs.intermediates[number]
            features = PackedFeatures((self.adapter.norm(x) if norm else x)[0], layout)
            restored = features.feature_maps() if output_fmt == "NCHW" else features.rows()
            maps.append((restored, features.prefix()) if return_prefix_tokens else restored)
        return maps

    # Speed

    def use_cuda_graphs(self, enable: bool = True, token_bucket: int = 256) -> None:
        """Run all blocks as one CUDA graph in inference on a GPU, for small batches that are bound by kernel launches.

        A graph is recorded for each batch size, each multiple of ``token_bucket`` tokens and each set of maps that
        occurs. Packed sequences need the ``varlen`` or ``flash_attn`` backend, that is half precision; images of equal
        length (``keep``) do not. On other devices and in training there is no graph. Graphs read parameters at fixed
        addresses: call this again if a parameter is replaced by other means than ``.to()`` or ``.train()``.

        Args:
            enable: False to stop using graphs.
            token_bucket: Lengths are padded to a multiple of this many tokens.

        Raises:
            ValueError: If ``token_bucket`` is below 1.
        """
        self.token_bucket = token_bucket if enable else None
        self.packed_encoder.graphs = GraphedBlocks() if enable else None

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute now what inference derives from the host's parameters, instead of in the first call."""
        derived = self.packed_encoder.derived
        maps = derived.fresh(derived.check(), waited=False).maps
        for scale in range(self.num_scales):
            maps.of_scale(scale)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks, as one graph for all blocks and all numbers of tokens.

        Args:
            args: As for ``torch.compile``.
            kwargs: As for ``torch.compile``.
        """
        self.packed_encoder.compile(*args, **kwargs)

    def forward_video(self, frames: Tensor, tolerance: float = 2.0) -> Any:
        """Classify the frames of a clip; patches that did not change since an earlier frame are not computed again.

        For inference. With a tolerance below 0 nothing is reused, and the result is that of `forward`; frames that are
        all equal give equal results. `aptvit.encoder.clips.run_clip` returns features, and which patches were computed.

        Args:
            frames: (T, C, H, W) in temporal order.
            tolerance: Greatest mean absolute change of the pixels of an unchanged base patch, on the scale of 0 to 255.

        Returns:
            What the host returns for images: (T, num_classes) logits.

        Raises:
            ValueError: If frames are not one tensor, or the model has windows, a scorer that runs the blocks, or is in
                training mode.
        """
        return self.adapter.forward_head(run_clip(self.packed_encoder, self.patchifier, frames, tolerance)[0], False)

    # nn.Module

    def __repr__(self) -> str:
        """The modules, with the host and the settings in the first line."""
        vit, budget, scorer = self.adapter.vit, self.budget, self.patchifier.scorer
        name = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture") or type(vit).__name__
        settings = {field.name: getattr(budget, field.name) for field in fields(budget)}
        chosen = [f"{key}={value}" for key, value in settings.items() if value not in (None, 0)]
        scored_by = getattr(scorer, "name", None) or getattr(scorer, "__name__", type(scorer).__name__)
        first, *modules = super().__repr__().splitlines()
        summary = ", ".join((name, *chosen, f"scales={self.num_scales}", f"scorer={scored_by}"))
        return "\n".join((f"{first}  # {summary}", *modules))

    def _unusual_batch(self, images: Images) -> Images:
        """A batch without images, (0, C, H, W) for an empty list: of images of one patch, or of one window.

        Raises:
            ValueError: If the model is traced: numbers of tokens follow from the pixels.
        """
        if len(images):  # usual but for being traced
            raise ValueError(
                "a trace would keep the patches of the example image for all others: save_pretrained() and then "
                "`aptvit export` make a graph that chooses them for each image (docs/how-to/export.md)"
            )
        if isinstance(images, Tensor):
            return images
        size = (self.patch_size * (self.window_size or 1),) * 2
        return torch.zeros(0, self.adapter.in_chans, *size, device=self.adapter.device)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.adapter.vit.training = mode
        self._clear_derived()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        self._clear_derived()
        return self

    def _clear_derived(self) -> None:
        """Drop everything derived from or recorded with parameters."""
        self.packed_encoder.clear()

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        return load(cls, *find_folder(model_id, **options))


def check_format(output_fmt: str) -> None:
    """Check the format of maps.

    Raises:
        ValueError: If it does not exist.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NLC'")


def check_global_blocks(numbers: Sequence[int], window_size: int | None, num_blocks: int) -> frozenset[int]:
    """Check the numbers of blocks that attend to the whole image.

    Args:
        numbers: Numbers of the blocks.
        window_size: Side of the windows in base patches; None without windows.
        num_blocks: Number of blocks of the host.

    Raises:
        ValueError: If a block does not exist, or there are no windows.
    """
    if window_size is None and len(numbers):
        raise ValueError(f"global_blocks={list(numbers)} without window_size: all blocks are global already")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size={window_size} must be at least one base patch")
    outside = [number for number in numbers if not 0 <= number < num_blocks]
    if outside:
        raise ValueError(f"global_blocks={list(numbers)}: there are blocks 0 to {num_blocks - 1}")
    return frozenset(numbers)


def take_indices(indices: int | Iterable[int] | None, num_blocks: int) -> list[int]:
    """Numbers of blocks in order, from timm's ``indices``: the last n blocks, these blocks, or None for all.

    Raises:
        ValueError: If a block does not exist.
    """
    if indices is None:
        return list(range(num_blocks))
    if isinstance(indices, int):
        numbers = list(range(num_blocks - indices, num_blocks))
    else:
        numbers = sorted({i + num_blocks if i < 0 else i for i in indices})
    if not numbers or numbers[0] < 0 or numbers[-1] >= num_blocks:
        raise ValueError(f"indices={indices!r} name no blocks of {num_blocks}: use 0 to {num_blocks - 1}")
    return numbers
