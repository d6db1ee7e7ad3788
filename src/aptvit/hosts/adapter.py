"""Protocol between adaptive models and the libraries of their hosts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from aptvit.layers.rotary import RelativePositions
from aptvit.patching.features import PackedFeatures

__all__ = ["HOST_ATTRIBUTES", "Adapter", "share_parameters", "share_registries"]

HOST_ATTRIBUTES = frozenset(
    (
        *("default_cfg", "embed_dim", "feature_info", "global_pool", "head_hidden_size", "in_chans", "num_classes"),
        *("num_features", "num_prefix_tokens", "pretrained_cfg"),
    )
)
"""Attributes of a host that models around it have, too."""

Module = TypeVar("Module", bound=nn.Module)


def share_parameters(module: Module) -> Module:
    """Copy a module's structure, with the same parameters, so that the copy can be changed without the original."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def share_registries(view: nn.Module, model: nn.Module) -> None:
    """Let ``view`` and ``model`` share their registries of parameters, buffers and children.

    So ``model`` has the host's state-dict keys, the host's methods work on ``view``, and a parameter or module that is
    replaced in one of them (by load_state_dict, .to(), FSDP, reset_classifier) is replaced in both.
    """
    for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        model.__dict__[registry] = view.__dict__[registry]


class Adapter(Protocol):
    """Access to the parts of one host model. ``vit`` is a copy of the host that shares its parameters."""

    vit: Any
    patch_size: int
    in_chans: int
    embed_dim: int
    num_prefix_tokens: int
    cut_size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    has_rotation: bool  # whether positions are rotary, by `rotation_table`
    relative_positions: RelativePositions | None  # of rotary positions

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The host's blocks."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the patch embedding."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the images that the patch embedding reads."""
        ...

    def patch_embed(self, images: Tensor) -> Tensor:
        """The host's own patch embedding, which is affine. (B, C, H, W) -> (B, D, H / p, W / p)"""
        ...

    def patch_norm(self, x: Tensor) -> Tensor:
        """The host's normalisation of patch embeddings before positions are added. (n, D) -> (n, D)"""
        ...

    def prefix_tokens(self) -> Tensor:
        """(P, D) class and register tokens, with their positions added."""
        ...

    def position_table(self, grid_size: tuple[int, int], factor: int) -> Tensor | None:
        """(cells, D) absolute positions of the complete patches of ``factor`` x ``factor`` base patches, or None."""
        ...

    def rotation_table(self, grid_size: tuple[int, int]) -> Tensor | None:
        """(..., h w, 2 R) rotary embedding of the base grid, sines then cosines, or None."""
        ...

    def position_parameters(self) -> list[Tensor]:
        """Parameters and buffers that positions are computed from."""
        ...

    def positions_vary(self) -> bool:
        """Whether positions are random in each call (shifts in training)."""
        ...

    def before_blocks(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D): dropout and normalisation between the embedding and the blocks."""
        ...

    def block_arguments(self, rotation: Tensor | None) -> list[dict[str, Any]]:
        """Keyword arguments of each block, from the rotary embeddings of the tokens, (..., T, 2 R) or None."""
        ...

    def norm(self, x: Tensor) -> Tensor:
        """The normalisation after the last block. (1, T, D) -> (1, T, D)"""
        ...

    def forward_head(self, features: PackedFeatures, pre_logits: bool) -> Tensor | tuple[Tensor, Tensor]:
        """Pooling and classifier: (B, num_classes) logits, or (B, D) pooled features with ``pre_logits``."""
        ...

    def group_matcher(self, coarse: bool) -> dict[str, Any]:
        """The host's layer groups, with the new parameters among the stem."""
        ...

    def host_config(self) -> dict[str, Any]:
        """Configuration that the host can be built from; JSON."""
        ...
