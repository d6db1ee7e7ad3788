"""Vision towers of transformers: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP and SigLIP 2, bare or inside a larger model.

The structure of these classes changes between releases, so a tower is found by its embedding layer, its blocks as the
only ModuleList in it, and the other parts by the names in `Family`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from aptvit.hosts.adapter import share_parameters
from aptvit.hosts.statistics import CLIP, HALF, IMAGENET, Statistics, published_statistics
from aptvit.hosts.timm import coarse_positions
from aptvit.hosts.transformers_attention import attend_by_registry
from aptvit.layers.drop_path import PackedDropPath
from aptvit.layers.patch_embed import COARSE_PREFIX
from aptvit.layers.rotary import RelativePositions
from aptvit.patching.features import PackedFeatures
from aptvit.patching.layout import PatchLayout

__all__ = [
    "REASONS",
    "TowerOutput",
    "TransformersAdapter",
    "build_host",
    "check_exported",
    "find_class",
    "find_tower",
    "reason_not_adaptable",
    "release_checkpointing",
    "rotation_of_grid",
]


@dataclass(frozen=True)
class Family:
    """Names and statistics of one family of towers.

    Attributes:
        norm: Name of the normalisation of all tokens after the last block; None if there is none.
        pool: Source of ``pooler_output``: "pooler" and "head" are modules of the tower, "class" is the first token,
            "normalised class" the first token after ``post_layernorm``.
        statistics: Mean and standard deviation of the published image processors.
    """

    norm: str | None
    pool: str
    statistics: Statistics = IMAGENET


_FAMILIES = {
    "ViTEmbeddings": Family("layernorm", "pooler", HALF),
    "DeiTEmbeddings": Family("layernorm", "pooler"),
    "Dinov2Embeddings": Family("layernorm", "class"),
    "Dinov2WithRegistersEmbeddings": Family("layernorm", "class"),
    "DINOv3ViTEmbeddings": Family("norm", "class"),
    "CLIPVisionEmbeddings": Family(None, "normalised class", CLIP),
    "SiglipVisionEmbeddings": Family("post_layernorm", "head", HALF),
    "Siglip2VisionEmbeddings": Family("post_layernorm", "head", HALF),
}
_PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
REASONS = {
    "swin": "Swin merges patches between its stages, which asks for a full grid",
    "swinv2": "Swin merges patches between its stages, which asks for a full grid",
    "vit_mae": "it drops patches at random to reconstruct them: load the checkpoint as ViTModel",
    "llava": "it is a vision language model: use aptvit.vlm.adapt_llava(model, processor)",
    "llava_next": "LLaVA-NeXT reads features as a grid of tiles, with a token at the end of each row",
    "llava_onevision": "LLaVA-OneVision reads features as a grid of tiles, with a token at the end of each row",
}


@dataclass
class TowerOutput(BaseModelOutputWithPooling):
    """Output of a tower of transformers, with the layout of its tokens.

    Attributes:
        last_hidden_state: (B, L, D) if all images have the same number of tokens (as with ``keep``), else a list of
            (L_i, D); (B, P + h w, D), the shape of the host's own output, with ``restore_grid=True``.
        layout: The patch of each token.
    """

    layout: PatchLayout | None = None


def find_tower(host: nn.Module) -> tuple[str, Any, Family] | None:
    """Name, module and family of the vision tower in a host."""
    for name, module in host.named_modules():
        family = _FAMILIES.get(type(getattr(module, "embeddings", None)).__name__)
        if family is not None:
            return name, module, family
    return None


def reason_not_adaptable(host: Any) -> str | None:
    """The reason why a model cannot run on adaptive patches; None if it can."""
    name = type(host).__name__
    if not isinstance(host, PreTrainedModel):
        return f"{name} is not a model of transformers, but a part of one: adapt the whole model"
    reason = REASONS.get(host.config.model_type)
    if reason is not None:
        return reason
    if name.endswith("Backbone"):
        return f"{name} expects a full grid: adapt the model itself and use forward_intermediates for feature maps"
    if name.endswith("ForMaskedImageModeling"):
        return f"{name} masks patches of a full grid"
    tower = find_tower(host)
    if tower is None:
        families = "ViT, DeiT, DINOv2 (with registers), DINOv3 ViT, CLIP, SigLIP and SigLIP 2"
        return f"{name} has no vision tower of these families: {families}"
    if not getattr(tower[1], "_supports_sdpa", getattr(host, "_supports_sdpa", False)):
        return f"{name} has no attention through scaled_dot_product_attention"
    return None


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class TransformersAdapter:
    """The `aptvit.hosts.adapter.Adapter` of vision towers of transformers.

    Args:
        host: The model. It is not changed: the adapter works on a copy of its structure with the same parameters.

    Attributes:
        vit: The copy: the tower, or the model that contains it.
        core: The tower in ``vit``.

    Raises:
        ValueError: If the model cannot be adapted.
    """

    def __init__(self, host: nn.Module) -> None:
        reason = reason_not_adaptable(host)
        if reason is not None:
            raise ValueError(
                f"cannot adapt this model: {reason}. docs/how-to/hugging-face.md lists what can be adapted, and why"
            )
        self.vit: Any = share_parameters(host)
        tower = find_tower(self.vit)
        assert tower is not None
        self.core_name, self.core, self._family = tower
        self.blocks: Any = next(m for m in self.core.modules() if isinstance(m, nn.ModuleList))
        _prepare_blocks(self.core, self.blocks)
        self._takes_mask = "attention_mask" in inspect.signature(self.blocks[0].forward).parameters
        config, embeddings = self.core.config, self.core.embeddings
        self.patch_size, width = _pair(config.patch_size)
        if self.patch_size != width:
            raise ValueError(f"cannot adapt this model: its patches of {config.patch_size} are not square")
        self.in_chans: int = config.num_channels
        self.embed_dim: int = config.hidden_size
        self._reads_rows = type(embeddings).__name__ == "Siglip2VisionEmbeddings"
        if self._reads_rows:  # images of any size
            self.cut_size = None
            self._native = _pair(embeddings.position_embedding_size)
        else:
            self.cut_size = height, width = _pair(config.image_size)
            self._native = (height // self.patch_size, width // self.patch_size)
        self.num_prefix_tokens = len(self.prefix_tokens())
        self.has_rotation = hasattr(self.core, "rope_embeddings")
        self.relative_positions: RelativePositions | None = RelativePositions(0.5, 5)  # of DINOv3
        self.mean, self.std = (tuple(values) for values in published_statistics(host) or self._family.statistics)

    # timm's attributes

    @property
    def num_features(self) -> int:
        return self.embed_dim

    head_hidden_size = num_features

    @property
    def classifier(self) -> Any:
        """The classifier of a model for classification; None in other models."""
        return getattr(self.vit, "classifier", getattr(self.vit, "cls_classifier", None))

    @property
    def num_classes(self) -> int:
        return 0 if self.classifier is None else self.vit.config.num_labels

    @property
    def global_pool(self) -> str:
        return "token" if self.num_prefix_tokens else "map"

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        return {}

    default_cfg = pretrained_cfg

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        return [
            {"num_chs": self.embed_dim, "reduction": self.patch_size, "module": f"blocks.{i}"}
            for i in range(len(self.blocks))
        ]

    # The protocol of adapters

    @property
    def _projection(self) -> Any:
        embeddings = self.core.embeddings
        embedding = getattr(embeddings, "patch_embedding", None)
        if embedding is None:
            embedding = embeddings.patch_embeddings
        return getattr(embedding, "projection", embedding)

    @property
    def device(self) -> torch.device:
        return next(iter(self._embedding_tensors())).device

    @property
    def dtype(self) -> torch.dtype:
        return next((t.dtype for t in self._embedding_tensors() if t.is_floating_point()), torch.float32)

    def _embedding_tensors(self) -> Iterator[Tensor]:
        """Parameters of the patch embedding, then those of the tower: quantised embeddings have no parameters."""
        for module in (self._projection, self.core):
            yield from module.parameters()

    def patch_embed(self, images: Tensor) -> Tensor:
        if not self._reads_rows:
            return self._projection(images)
        # SigLIP 2: a linear layer on pixels in the order row, column, channel. (B, C, h p, w p) -> (B, h, w, p p C)
        cells = images.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))
        rows = self._projection(cells.permute(0, 2, 4, 3, 5, 1).flatten(3))
        return rows.permute(0, 3, 1, 2)

    def patch_norm(self, x: Tensor) -> Tensor:
        return x

    def _tokens(self) -> list[Tensor]:
        tokens = (getattr(self.core.embeddings, name, None) for name in _PREFIX)
        return [token for token in tokens if token is not None]

    def _positions(self) -> Tensor | None:
        """(1, prefix positions + cells, D)."""
        embeddings = self.core.embeddings
        if hasattr(embeddings, "position_embedding"):
            return embeddings.position_embedding.weight[None]
        return getattr(embeddings, "position_embeddings", None)

    def _num_prefix_positions(self, table: Tensor) -> int:
        return table.shape[1] - self._native[0] * self._native[1]

    def prefix_tokens(self) -> Tensor:
        tokens = self._tokens()
        if not tokens:
            return torch.zeros(0, self.embed_dim, device=self.device, dtype=self.dtype)
        prefix = torch.cat([token.reshape(-1, self.embed_dim) for token in tokens])  # (P, D)
        table = self._positions()
        if table is None:
            return prefix
        num_positions = self._num_prefix_positions(table)  # registers have none
        return torch.cat([prefix[:num_positions] + table[0, :num_positions], prefix[num_positions:]])

    def position_table(self, grid_size: tuple[int, int], factor: int) -> Tensor | None:
        table = self._positions()
        if table is None:
            return None
        prefix = self._num_prefix_positions(table)
        if factor > 1:
            return coarse_positions(table[:, prefix:], self._native, grid_size, factor)
        if grid_size == self._native:
            return table[0, prefix:]
        return self._interpolated(table, prefix, grid_size)

    def _interpolated(self, table: Tensor, prefix: int, grid_size: tuple[int, int]) -> Tensor:
        """Positions of another grid, as the host itself interpolates them. -> (cells, D)"""
        embeddings, cells = self.core.embeddings, grid_size[0] * grid_size[1]
        if hasattr(embeddings, "resize_positional_embeddings"):
            square = table[0].unflatten(0, self._native)
            return embeddings.resize_positional_embeddings(square, torch.tensor([grid_size]), cells)[0]
        if self._native[0] != self._native[1]:  # the host assumes a square grid
            return coarse_positions(table[:, prefix:], self._native, grid_size, 1)
        shape_only = table.new_empty(1).expand(1, prefix + cells, self.embed_dim)
        height, width = (side * self.patch_size for side in grid_size)
        return embeddings.interpolate_pos_encoding(shape_only, height, width)[0, prefix:]

    def rotation_table(self, grid_size: tuple[int, int]) -> Tensor | None:
        rope = getattr(self.core, "rope_embeddings", None)
        if rope is None:
            return None
        return rotation_of_grid(rope, grid_size, self.patch_size, self.device, self.dtype)

    def position_parameters(self) -> list[Tensor]:
        table = self._positions()
        rope = getattr(self.core, "rope_embeddings", None)
        return [*([] if table is None else [table]), *([] if rope is None else rope.buffers())]

    def positions_vary(self) -> bool:
        rope, config = getattr(self.core, "rope_embeddings", None), self.core.config
        shifts = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
        return rope is not None and rope.training and any(getattr(config, name, None) is not None for name in shifts)

    def before_blocks(self, x: Tensor) -> Tensor:
        if hasattr(self.core.embeddings, "dropout"):
            x = self.core.embeddings.dropout(x)
        return self.core.pre_layrnorm(x) if hasattr(self.core, "pre_layrnorm") else x  # CLIP, and spelled like this

    def block_arguments(self, rotation: Tensor | None) -> list[dict[str, Any]]:
        arguments: dict[str, Any] = {"attention_mask": None} if self._takes_mask else {}
        if rotation is not None:
            sin, cos = rotation.chunk(2, dim=-1)
            arguments["position_embeddings"] = (cos, sin)
        return [arguments] * len(self.blocks)

    def norm(self, x: Tensor) -> Tensor:
        return x if self._family.norm is None else getattr(self.core, self._family.norm)(x)

    def forward_head(self, features: PackedFeatures, pre_logits: bool) -> Any:
        """``pooler_output``; with a classifier its logits, or its input with ``pre_logits``."""
        if self.classifier is None:
            return self.pool(features)
        if not pre_logits:
            return self.vit(pixel_values=features).logits
        pooled: list[Tensor] = []
        with self.classifier.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0])):
            self.vit(pixel_values=features)
        return pooled[0]

    # Inputs of the host's own heads

    def pool(self, features: PackedFeatures) -> Tensor | None:
        """(B, D) ``pooler_output``; None if the tower has none."""
        core, kind = self.core, self._family.pool
        if kind == "head":
            return self._attentive_pool(features) if getattr(core, "use_head", True) else None
        prefix = features.prefix()
        if kind == "pooler":
            return None if core.pooler is None else core.pooler(prefix)
        return core.post_layernorm(prefix[:, 0]) if kind == "normalised class" else prefix[:, 0]

    def _attentive_pool(self, features: PackedFeatures) -> Tensor:
        """SigLIP's attention pooling, with any number of tokens per image. -> (B, D)"""
        head = self.core.head
        tokens, valid = features.padded()
        if valid is None:
            return head(tokens)
        probe = head.probe.expand(len(tokens), -1, -1)
        x = head.attention(probe, tokens, tokens, key_padding_mask=~valid, need_weights=False)[0]
        return (x + head.mlp(head.layernorm(x)))[:, 0]

    def summary(self, features: PackedFeatures) -> Tensor:
        """(B, P + 1, D) prefix tokens and the mean of the patch tokens, the inputs of classifiers."""
        tokens, valid = features.padded(include_prefix=False)
        if valid is None:
            mean = tokens.mean(1)
        else:
            mean = tokens.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True)
        return torch.cat([features.prefix(), mean[:, None]], dim=1)

    # Training, saving

    def group_matcher(self, coarse: bool) -> dict[str, Any]:
        core = re.escape(f"{self.core_name}." if self.core_name else "")
        blocks = re.escape(next(name for name, module in self.core.named_modules() if module is self.blocks))
        return {
            "stem": rf"^{core}(?:embeddings|pre_layrnorm|rope_embeddings)|^{COARSE_PREFIX}",
            "blocks": [
                (rf"^{core}{blocks}\.(\d+)", None),
                (rf"^{core}(?:layernorm|norm|post_layernorm|pooler|head)\.", (99999,)),
            ],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: tokens and positions."""
        names = (*_PREFIX, "position_embeddings", "position_embedding.weight")
        return {name for name, _ in self.vit.named_parameters() if name.endswith(names)}

    def host_config(self) -> dict[str, Any]:
        name = type(self.vit).__name__
        check_exported(type(self.vit))
        return {
            "library": "transformers",
            "architecture": name,
            "host": json.loads(self.vit.config.to_json_string(use_diff=False)),
        }


def rotation_of_grid(
    rope: nn.Module, grid_size: tuple[int, int], patch_size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(h w, 2 R) sines, then cosines of DINOv3's rotary embedding for the base patches of a grid."""
    height, width = (side * patch_size for side in grid_size)
    cos, sin = rope(torch.empty(1, device=device, dtype=dtype).expand(1, 1, height, width))
    return torch.cat([sin, cos], dim=-1)


def find_class(name: str, config: str) -> Any:
    """The class of a saved model, whose configuration anybody may have written.

    Args:
        name: Name of the class.
        config: The configuration, as JSON.

    Raises:
        ValueError: If the installed transformers has no such class, or the configuration names another model.
    """
    kind: Any = getattr(transformers, name, None)
    if PreTrainedModel not in getattr(kind, "__mro__", ()):
        raise ValueError(f"transformers {transformers.__version__} has no model {name!r}"[:200])
    if "use_pretrained_backbone" in config:  # another model, which would be fetched
        raise ValueError(f"{name} is built around another model, which a folder cannot name")
    return kind


def check_exported(kind: type) -> None:
    """Check that a class of models can be found by its name.

    Raises:
        ValueError: If transformers does not export it.
    """
    if getattr(transformers, kind.__name__, None) is not kind:
        raise ValueError(
            f"this host is of a class {kind.__name__} that transformers does not export, so it could not be built "
            "again: save model.state_dict() instead"
        )


def build_host(config: dict[str, Any]) -> nn.Module:
    """Build a host from `TransformersAdapter.host_config`, with random weights.

    Raises:
        ValueError: If the installed transformers has no such model, or it is built around another one.
    """
    kind = find_class(config["architecture"], json.dumps(config["host"]))
    return kind(kind.config_class.from_dict(config["host"]))


def _prepare_blocks(core: Any, blocks: nn.ModuleList) -> None:
    """Modify blocks in place: attention through transformers' registry; stochastic depth per image."""
    attend_by_registry(core, blocks)
    for block in blocks:
        for name, child in block.named_children():
            if type(child).__name__.endswith("DropPath"):
                setattr(block, name, PackedDropPath(child.drop_prob))  # type: ignore[arg-type]


def release_checkpointing(blocks: Sequence[nn.Module]) -> bool:
    """Disable activation checkpointing inside of blocks.

    Returns:
        Whether it was enabled.
    """
    checkpointed = [block for block in blocks if getattr(block, "gradient_checkpointing", False)]
    for block in checkpointed:
        block.gradient_checkpointing = False  # type: ignore[assignment]
    return bool(checkpointed)
