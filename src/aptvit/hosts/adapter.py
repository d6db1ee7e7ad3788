"""What the model asks of a host library."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from aptvit.patching.features import PackedFeatures

__all__ = ["HOST_ATTRIBUTES", "Adapter", "share_parameters", "share_registries"]

HOST_ATTRIBUTES = frozenset(
    (
        *("default_cfg", "embed_dim", "feature_info", "global_pool", "head_hidden_size", "in_chans", "num_classes"),
        *("num_features", "num_prefix_tokens", "pretrained_cfg"),
    )
)
"""What a model built on a host answers as the host does."""

Module = TypeVar("Module", bound=nn.Module)


def share_parameters(module: Module) -> Module:
    """A copy of a module's structure around the same parameters, free to be changed without touching the original."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def share_registries(view: nn.Module, model: nn.Module) -> None:
    """Make ``view`` and ``model`` one set of parameters, buffers and children under the same names.

    So ``model`` has the host's keys, the host's methods work on ``view``, and what is replaced in one (by
    load_state_dict, .to(), FSDP, reset_classifier) is replaced in both.
    """
    for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        model.__dict__[registry] = view.__dict__[registry]


class Adapter(Protocol):
    """How to enter one host model. An adapter owns ``vit``, a copy of the host that shares its parameters."""

    vit: Any
    patch_size: int
    in_chans: int
    embed_dim: int
    num_prefix_tokens: int
    cut_size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The host's blocks."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the patch embedding is."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the images that it reads."""
        ...

    def patch_embed(self, images: Tensor) -> Tensor:
        """The host's own patch embedding, which is affine. (B, C, H, W) -> (B, D, H / p, W / p)"""
        ...

    def patch_norm(self, x: Tensor) -> Tensor:
        """What the host does to patch embeddings before positions are added. (n, D) -> (n, D)."""
        ...

    def prefix_tokens(self) -> Tensor:
        """(P, D) class and register tokens, with their positions."""
        ...

    def position_table(self, grid_size: tuple[int, int], factor: int) -> Tensor | None:
        """(cells, D) absolute positions of the complete patches of ``factor`` x ``factor`` base patches."""
        ...

    def rotation_table(self, grid_size: tuple[int, int]) -> Tensor | None:
        """(..., h w, 2 R) rotary embedding of the base grid, sines then cosines."""
        ...

    def position_parameters(self) -> list[Tensor]:
        """What position tables are made of."""
        ...

    def positions_vary(self) -> bool:
        """Whether each call gives other positions (random shifts in training)."""
        ...

    def before_blocks(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D): dropout and normalisation between the embedding and the blocks."""
        ...

    def block_arguments(self, rotation: Tensor | None) -> list[dict[str, Any]]:
        """What each block takes besides (1, T, D)."""
        ...

    def norm(self, x: Tensor) -> Tensor:
        """The normalisation after the last block."""
        ...

    def forward_head(self, features: PackedFeatures, pre_logits: bool) -> Tensor | tuple[Tensor, Tensor]:
        """Pooling and classifier."""
        ...

    def group_matcher(self, coarse: bool) -> dict[str, Any]:
        """The host's layer groups, with the new parameters among the stem."""
        ...

    def host_config(self) -> dict[str, Any]:
        """What `from_config` needs to build the host again; JSON."""
        ...
