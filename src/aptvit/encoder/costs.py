"""Operations of a host's blocks, counted with PyTorch's counter on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from aptvit.hosts.adapter import Adapter
from aptvit.layers.patch_embed import COARSE_PREFIX
from aptvit.measuring.operations import count_flops

__all__ = ["flops_of_blocks", "flops_of_coarse_embedding"]


def flops_of_blocks(adapter: Adapter, number: int) -> Callable[..., np.ndarray]:
    """Operations of a host's first blocks, as a function of one image's tokens, prefix tokens included.

    Args:
        adapter: The host's adapter.
        number: Number of blocks.

    Returns:
        (query tokens, key tokens) -> operations; by default the keys are those of the query tokens.
    """
    # Operations are a quadratic polynomial of the number of tokens, which three points determine.
    points = (64, 128, 256)
    square, linear, constant = np.polyfit(
        points, [float(_blocks_flops(adapter, number, tokens)) for tokens in points], 2
    )

    def flops(tokens: np.ndarray | float, keys: np.ndarray | float | None = None) -> np.ndarray:
        rows = np.asarray(tokens, dtype=float)
        return (square * np.asarray(rows if keys is None else keys) + linear) * rows + constant

    return flops


def flops_of_coarse_embedding(adapter: Adapter, num_patches: int) -> float:
    """Operations of embedding one image in 2x patches, by the modules (Eq. 2).

    Args:
        adapter: The host's adapter.
        num_patches: Base patches of the image.
    """
    per_patch = 2 * adapter.embed_dim * adapter.in_chans * adapter.patch_size**2
    resized = per_patch * num_patches / 4
    if getattr(adapter.vit, COARSE_PREFIX, None) is None:
        return resized
    branch = 2 * (4 + 1) * adapter.embed_dim**2 * num_patches / 4  # a 2x2 convolution and a linear layer
    return resized + per_patch * num_patches + branch


def _blocks_flops(adapter: Adapter, number: int, tokens: int) -> int:
    rotation = adapter.rotation_table((1, tokens))
    if rotation is not None:
        rotation = torch.empty(*rotation.shape[:-2], tokens, rotation.shape[-1], device="meta")
    arguments = adapter.block_arguments(rotation)
    x = torch.empty(1, tokens, adapter.embed_dim, device="meta")
    total = 0
    with torch.no_grad():
        for block, block_arguments in list(zip(adapter.blocks, arguments, strict=True))[:number]:
            total += count_flops(partial(_on_meta, block, x, block_arguments))
    return total


def _on_meta(block: nn.Module, x: Tensor, arguments: dict[str, Tensor]) -> Tensor:
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    without_data = {name: torch.empty_like(value, device="meta", dtype=x.dtype) for name, value in state.items()}
    return torch.func.functional_call(block, without_data, (x,), arguments)
