"""timm's NaFlexVit on adaptive patches: also takes the batches of patches that timm's NaFlex collator makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aptvit.hosts.naflex import images_of_patches
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.images import ImageGroup, Images

__all__ = ["AdaptiveNaFlexVit"]


class AdaptiveNaFlexVit(AdaptivePatchTransformer):
    """A NaFlexVit on adaptive patches.

    Besides images it takes ``dict(patches, patch_coord, patch_valid)``: images of any size and shape, cut into patches.
    Padding is left out: images of a batch are packed, whatever their sizes.

    Args:
        host: The pretrained model.
        options: As for `aptvit.AdaptivePatchTransformer`.
    """

    def _groups(self, images: Images | Mapping[str, Any]) -> list[ImageGroup]:
        if isinstance(images, Mapping):
            embeds = self.adapter.vit.embeds
            images = images_of_patches(dict(images), self.patch_size, embeds.in_chans, embeds.channels_last)
        return super()._groups(images)
