"""Random: patch tokens are dropped at random before the blocks, the same share in every image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aptvit.merging.reduced import HostView
from aptvit.merging.settings import names_setting, num_kept_of

__all__ = ["RandomTransformer", "random"]


@names_setting
def random(model: nn.Module, keep: float = 0.5, *, seed: int = 0) -> RandomTransformer:
    """Drop patch tokens at random, after positions are added and before the blocks; in training and in evaluation.

    Every image keeps different random tokens, ``round(keep * N)`` of N but at least one, in raster order. The generator
    of each batch is seeded with ``seed`` and the number of previous batches: models with the same seed on the same
    sequence of batch shapes choose the same tokens. ``model.num_batches = 0`` restarts the sequence.

    Args:
        model: A timm VisionTransformer or DeiT. Its parameters are shared, and it is not changed.
        keep: Share of the patch tokens to keep, the same in every image and every block.
        seed: Seed of the choice.

    Returns:
        The model, from (B, C, H, W) images to (B, num_classes) logits.

    Raises:
        ValueError: If keep is not in (0, 1], or the model is of another class.
    """
    return RandomTransformer(model, keep, seed)


class RandomTransformer(HostView):
    """A host on a random part of the patch tokens; see `random`.

    Args:
        host: A timm VisionTransformer or VisionTransformerDistilled.
        keep: Share of the patch tokens to keep.
        seed: Seed of the choice.

    Raises:
        ValueError: If keep is not in (0, 1], or the model is of another class.
    """

    def __init__(self, host: nn.Module, keep: float, seed: int) -> None:
        super().__init__(host)
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep!r} must be a share of the patch tokens in (0, 1]")
        self.keep = keep
        self.seed = seed
        self.num_batches = 0

    def tokens_per_block(self, grid_size: tuple[int, int] | None = None) -> list[int]:
        num_prefix = self.vit.num_prefix_tokens
        num_kept = num_kept_of(self.keep, self._num_tokens(grid_size) - num_prefix)
        return [num_prefix + num_kept] * len(self.vit.blocks)

    def _embed(self, images: Tensor) -> Tensor:
        prefix, patches = super()._embed(images).tensor_split([self.vit.num_prefix_tokens], dim=1)
        num_kept = num_kept_of(self.keep, patches.shape[1])
        if num_kept == patches.shape[1]:
            return torch.cat([prefix, patches], dim=1)
        # The large factor prevents that the batches of one seed are shifted batches of the next seed.
        generator = torch.Generator(images.device).manual_seed((self.seed * 1_000_003 + self.num_batches) % 2**63)
        self.num_batches += 1
        noise = torch.rand(patches.shape[:2], generator=generator, device=images.device)
        kept = noise.argsort(dim=1)[:, :num_kept].sort(dim=1).values  # (B, n)
        return torch.cat([prefix, patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))], dim=1)
