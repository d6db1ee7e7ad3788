"""The ViT inside a larger model of transformers: its embeddings, its layers, and how its tokens lie in tensors.

The structure is found, not listed: a module with a child ``embeddings`` that holds one patch projection, and a list of
layers with attention. What cannot be seen in the structure (windows, statistics of images) is in `_TRAITS`, by the
class of the embeddings.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.utils import logging

from aptvit.files.model_folders import read_config
from aptvit.hosts.statistics import CLIP, HALF, IMAGENET, Statistics, published_statistics
from aptvit.hosts.transformers import REASONS, find_class, find_tower, rotation_of_grid
from aptvit.hosts.transformers_attention import attend_by_registry
from aptvit.layers.drop_path import PackedDropPath
from aptvit.layers.rotary import RelativePositions

__all__ = ["InnerViT", "is_around_a_vit", "load_class", "reason_not_adaptable"]


@dataclass(frozen=True)
class _Traits:
    """What the structure of a family does not show.

    Attributes:
        statistics: Mean and standard deviation of its published image processors.
        windows: Attribute of the configuration with the number of windows along a side; rows of tensors are windows.
        is_global: Whether a layer joins the windows.
        is_square_only: Whether images must be squares.
        map_attention: Name of the attention in a layer that takes maps, in place of rows of tokens.
        channels_last: Whether maps are (B, h, w, D), not (B, D, h, w).
    """

    statistics: Statistics = IMAGENET
    windows: str | None = None
    is_global: Callable[[Any], bool] = lambda layer: True
    is_square_only: bool = False
    map_attention: str | None = None
    channels_last: bool = False


_TRAITS = {
    "ViTEmbeddings": _Traits(HALF),
    "DPTViTEmbeddings": _Traits(HALF),
    "BeitEmbeddings": _Traits(HALF),
    "Data2VecVisionEmbeddings": _Traits(HALF),
    "OwlViTVisionEmbeddings": _Traits(CLIP),
    "Owlv2VisionEmbeddings": _Traits(CLIP),
    "RfDetrDinov2Embeddings": _Traits(IMAGENET, "num_windows", lambda layer: layer.global_attention, True),
    "VitDetEmbeddings": _Traits(map_attention="attention"),
    "SamPatchEmbeddings": _Traits(map_attention="attn", channels_last=True),
    "SamHQPatchEmbeddings": _Traits(map_attention="attn", channels_last=True),
    "LwDetrViTEmbeddings": _Traits(IMAGENET, "num_windows_side", lambda layer: not layer.window),
}


def is_around_a_vit(host: Any) -> bool:
    """Whether a model of transformers is one around a ViT, not a tower, a classifier or a CLIP-like pair of towers."""
    if not isinstance(host, PreTrainedModel):
        return False
    tower = find_tower(host)
    if tower is None:
        return True
    return isinstance(tower[1], BackboneMixin) or hasattr(host.config, "encoder") or not _is_plain(host, tower[1])


def _is_plain(host: Any, tower: Any) -> bool:
    """Whether a host is the tower itself, a classifier of it, or a pair of towers for images and text."""
    return host is tower or type(host).__name__.endswith(
        ("Model", "ForImageClassification", "WithTeacher", "WithProjection")
    )


def reason_not_adaptable(host: Any) -> str | None:
    """The reason why the ViT inside a model cannot run on adaptive patches; None if it can."""
    name, config = type(host).__name__, host.config
    if hasattr(config, "text_config") and getattr(host, "can_generate", bool)():
        return f"{name} is a vision language model: use aptvit.vlm.adapt(model, processor)"
    kinds = [getattr(part, "model_type", "") for part in (config, getattr(config, "backbone_config", None))]
    for kind in kinds:
        if kind in REASONS:
            return REASONS[kind]
    if name.endswith(("ForPreTraining", "ForMaskedImageModeling")):
        return f"{name} reads masked patches of a full grid"
    vits = _find(host)
    if not vits:
        return (
            f"{name} has no ViT inside whose parts can be told: a patch projection in `embeddings`, and a list of "
            "layers with attention"
        )
    if len(vits) > 1:
        return f"{name} holds more than one ViT ({', '.join(core_name for core_name, *_ in vits)}): adapt them apart"
    _, core, projection, _ = vits[0]
    takes_maps = _TRAITS.get(type(_embeddings_of(core)[1]).__name__, _Traits()).map_attention is not None
    if not takes_maps and not getattr(core, "_supports_sdpa", getattr(host, "_supports_sdpa", False)):
        return f"{type(core).__name__} has no attention through scaled_dot_product_attention"
    if getattr(projection, "groups", 1) != 1 or any(n != 1 for n in _tuple(getattr(projection, "dilation", 1))):
        return f"{type(core).__name__} embeds patches by a convolution with groups or dilation"
    if _tuple(projection.stride) != _tuple(projection.kernel_size):
        return f"{type(core).__name__} embeds patches that overlap"
    *_, height, width = projection.kernel_size
    if height != width:
        return f"its patches of {height}x{width} are not square"
    if projection.padding == "same":
        return f"{type(core).__name__} pads images for its patch embedding by a rule of its own"
    return None


def load_class(name: str, folder: Path) -> Any:
    """Load a plain model of transformers from a folder, in eval mode; only safetensors are read, no code is run.

    Args:
        name: Name of its class.
        folder: The folder.

    Raises:
        ValueError: If the installed transformers has no such class, or its configuration names another model.
    """
    kind = find_class(name, json.dumps(read_config(folder)))
    with _no_progress_bars():
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without the bar of transformers for each file, which is there even where there is no terminal."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _find(host: nn.Module) -> list[tuple[str, Any, Any, nn.ModuleList]]:
    """Name, module, patch projection and layers of each ViT inside a host; those inside of others left out."""
    vits: list[tuple[str, Any, Any, nn.ModuleList]] = []
    for name, module in host.named_modules():
        _, embeddings = _embeddings_of(module)
        if not isinstance(embeddings, nn.Module) or any(name.startswith(f"{other}.") for other, *_ in vits if other):
            continue
        projections = [part for part in embeddings.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d))]
        layers = _find_layers(module)
        if len(projections) == 1 and layers is not None:
            vits.append((name, module, projections[0], layers))
    return vits


def _embeddings_of(core: nn.Module) -> tuple[str, Any]:
    """Name and module of the embeddings of a ViT; None for other modules."""
    if type(getattr(core, "patch_embed", None)).__name__ in _TRAITS:
        return "patch_embed", core.patch_embed
    return "embeddings", getattr(core, "embeddings", None)


def _find_layers(core: nn.Module) -> nn.ModuleList | None:
    """The list of layers: the first whose modules all have attention."""
    for name, module in core.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) and not name.startswith("embeddings")
        if is_list and all(any("Attention" in type(part).__name__ for part in layer.modules()) for layer in module):
            return module
    return None


class InnerViT:
    """Access to the ViT inside a host, and the patch embedding of `aptvit.layers.patch_embed` for it.

    Args:
        host: The host, a copy: configurations and layers of the ViT are changed.

    Attributes:
        vit: The host.
        core_name: Name of the module in the host whose forward runs embeddings and layers; "" for the host itself.
        core: This module.
        embeddings_name: Name of its embeddings.
        layers: The layers.
        map_attention: Name of the attention in layers that take maps; None for layers that take rows of tokens.
        channels_last: Whether maps are (B, h, w, D), not (B, D, h, w).
        patch_size: Side of a base patch in pixels.
        depth: Frames of a patch; 1 for images.
        in_chans: Channels of a patch: of all its frames, frame by frame.
        num_windows: Windows along a side of an image, which are rows of the host's tensors; 1 for none.
        is_square_only: Whether images must be squares.
        has_rotation: Whether layers take rotary embeddings of the cells.
        rotates_in_attention: Whether attention makes rotary embeddings of the numbers of cells.
        mean: Mean of each channel.
        std: Standard deviation of each channel.

    Raises:
        ValueError: If the host cannot be adapted.
    """

    relative_positions = RelativePositions(0.5, 5)  # of DINOv3

    def __init__(self, host: Any) -> None:
        reason = reason_not_adaptable(host)
        if reason is not None:
            raise ValueError(f"cannot adapt this model: {reason}. docs/hosts.md lists what can be adapted, and why")
        self.vit = host
        ((self.core_name, self.core, projection, self.layers),) = _find(host)
        self.embeddings_name, self.embeddings = _embeddings_of(self.core)
        self._projection_name = next(name for name, part in self.embeddings.named_modules() if part is projection)
        self._traits = _TRAITS.get(type(self.embeddings).__name__, _Traits())
        self.map_attention, self.channels_last = self._traits.map_attention, self._traits.channels_last
        self.patch_size: int = projection.kernel_size[-1]
        self.depth: int = projection.kernel_size[0] if isinstance(projection, nn.Conv3d) else 1
        self.in_chans: int = projection.in_channels * self.depth
        self.embed_dim: int = projection.out_channels
        self.num_windows: int = getattr(self.core.config, self._traits.windows) if self._traits.windows else 1
        self.shift = 0 if projection.padding == "valid" else _tuple(projection.padding)[-1]
        self._unpadded: Any = None
        if self.shift:
            self._unpadded = copy.copy(projection)  # the same registries: parameters are replaced in both
            self._unpadded.padding = (0, 0)
        self.has_rotation = hasattr(self.core, "rope_embeddings")
        # Positions that attention itself makes of the numbers of cells, as in V-JEPA 2.
        self.rotates_in_attention = any(hasattr(part, "get_position_ids") for part in self.core.modules())
        self.is_square_only = self._traits.is_square_only
        self._prepare_layers()
        mean, std = published_statistics(host) or self._traits.statistics
        self.mean, self.std = tuple(mean) * self.depth, tuple(std) * self.depth

    def _prepare_layers(self) -> None:
        if self.map_attention is not None:
            return  # `aptvit.models.around` replaces all that reads maps
        attend_by_registry(self.core, self.layers)
        for layer in self.layers:
            if hasattr(layer, "num_windows"):
                layer.num_windows = 1  # type: ignore[assignment]  # joining windows is left to packed attention
            for name, child in layer.named_children():
                if type(child).__name__.endswith("DropPath"):
                    setattr(layer, name, PackedDropPath(child.drop_prob).train(child.training))  # type: ignore[arg-type]

    @property
    def projection(self) -> Any:
        """The patch projection, or an adapter (LoRA) that was put in its place."""
        return self.embeddings.get_submodule(self._projection_name)

    @property
    def device(self) -> torch.device:
        return next(self.core.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next((t.dtype for t in self.core.parameters() if t.is_floating_point()), torch.float32)

    # Images

    def images(self, pixel_values: Tensor) -> Tensor:
        """The images that patches are cut from: frames of a patch as channels, shifted if the host pads them.

        Args:
            pixel_values: (B, C, H, W), or clips (B, frames, C, H, W).

        Returns:
            (B, C, H, W), or (B T, depth C, H, W) with T patches along the time.

        Raises:
            ValueError: If there are not as many dimensions.
        """
        expected = 4 if self.depth == 1 else 5
        if pixel_values.ndim != expected:
            shape = "(B, C, H, W)" if self.depth == 1 else "(B, frames, C, H, W)"
            raise ValueError(f"pixel_values of shape {tuple(pixel_values.shape)} are not {shape}")
        if self.depth > 1:
            frames = pixel_values
            if frames.shape[1] < self.depth:  # the host repeats an image
                frames = frames.repeat(1, self.depth, 1, 1, 1)
            whole = frames.shape[1] // self.depth * self.depth
            pixel_values = frames[:, :whole].unflatten(1, (-1, self.depth)).flatten(2, 3).flatten(0, 1)
        if self.shift:
            height, width = pixel_values.shape[2:]
            pixel_values = F.pad(pixel_values, (self.shift,) * 4)[:, :, :height, :width]
        return pixel_values

    def patch_embed(self, images: Tensor) -> Tensor:
        """The host's projection of patches, which is affine. (n, C, h p, w p) -> (n, D, h, w)"""
        if self.depth == 1:
            return (self._unpadded or self.projection)(images)
        clips = images.unflatten(1, (self.depth, -1)).transpose(1, 2)  # (n, C, depth, H, W)
        return self.projection(clips).squeeze(2)

    def patch_norm(self, x: Tensor) -> Tensor:
        """The host's normalisation of patch embeddings before positions are added. (..., D) -> (..., D)"""
        norm = getattr(self.embeddings, "rms_norm", None)  # of AIMv2
        return x if norm is None else norm(x)

    def embed_by_host(self, pixel_values: Tensor, *args: Any, **options: Any) -> Any:
        """The host's own embeddings: (R, N, D), a map (B, D, h, w), or an output with such tokens as its first."""
        return type(self.embeddings).forward(self.embeddings, pixel_values, *args, **options)

    @staticmethod
    def tokens_of(embedded: Any) -> Tensor:
        """The tokens in the host's embeddings."""
        return embedded if isinstance(embedded, Tensor) else embedded[0]

    # Maps

    def rows_of_map(self, maps: Tensor) -> Tensor:
        """(B, D, h, w), or (B, h, w, D) -> (B, h w, D)"""
        return maps.flatten(1, 2) if self.channels_last else maps.flatten(2).transpose(1, 2)

    def map_of_rows(self, rows: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """(B, h w, D) -> (B, D, h, w), or (B, h, w, D)"""
        return rows.unflatten(1, grid_size) if self.channels_last else rows.transpose(1, 2).unflatten(2, grid_size)

    def position_parameters(self) -> list[Tensor]:
        """Parameters and buffers of the embeddings other than the projection."""
        projection = {id(tensor) for tensor in (*self.projection.parameters(), *self.projection.buffers())}
        tensors = (*self.embeddings.parameters(), *self.embeddings.buffers())
        return [tensor for tensor in tensors if id(tensor) not in projection and tensor.is_floating_point()]

    # Positions

    def rotation_table(self, grid_size: tuple[int, int]) -> Tensor:
        """(h w, 2 R) rotary embedding of a grid, sines then cosines."""
        return rotation_of_grid(self.core.rope_embeddings, grid_size, self.patch_size, self.device, self.dtype)

    def is_global(self, layer: Any) -> bool:
        """Whether the tokens of a layer attend to the whole image, not inside their window."""
        return self.num_windows == 1 or self._traits.is_global(layer)

    def shape_of_rows(self, embedded: Any) -> tuple[int, int]:
        """(R, N) of the rows that layers read, from the host's embeddings."""
        embedded = self.tokens_of(embedded)
        if embedded.ndim == 4:
            batch, cells, _ = self.rows_of_map(embedded).shape
            return batch * self.num_windows**2, cells // self.num_windows**2
        return embedded.shape[0], embedded.shape[1]

    def places(self, num_images: int, grid_size: tuple[int, int], rows: int, tokens: int) -> tuple[Tensor, int]:
        """Where the cells of images are in the host's rows of tokens.

        Args:
            num_images: B images, or B T of clips with T patches along the time.
            grid_size: (h, w) in base patches.
            rows: R rows of the host's tensors: clips, images or windows.
            tokens: N tokens of a row.

        Returns:
            (images, h, w) place of each cell in the (R N) tokens, and the prefix tokens of a row.

        Raises:
            ValueError: If the numbers do not fit.
        """
        (height, width), n = grid_size, self.num_windows
        cells = num_images * height * width
        prefix = tokens - cells // rows
        if cells % rows or prefix < 0:
            raise ValueError(
                f"{type(self.core).__name__} has {rows} rows of {tokens} tokens for {num_images} grids of "
                f"{height}x{width} patches: this is not a plain order of tokens"
            )
        # The cells numbered window by window, in raster order of the images.
        order = torch.arange(cells, device=self.device).view(-1, n, n, height // n, width // n).transpose(2, 3)
        row, cell = order // (cells // rows), order % (cells // rows)
        return (row * tokens + prefix + cell).reshape(num_images, height, width), prefix
