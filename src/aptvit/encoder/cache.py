"""What a scorer may compute of images with the blocks, for the encoder to go on from."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from aptvit.encoder.encoder import BlockOutputs, Encoder, Request, Tokens
from aptvit.layers.position_embed import Rotation
from aptvit.patching.layout import PatchLayout

__all__ = ["EncoderCache", "select_tokens"]


class EncoderCache(Protocol):
    """What a scorer computed of images with the blocks, in ``layout.cache``; it runs the blocks on what is missing."""

    def run(self, encoder: Encoder, tokens: Tokens, layout: PatchLayout, request: Request) -> BlockOutputs:
        """As `Encoder.run`, for all tokens of the layout."""
        ...

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        ...

    def read_ratio(self, layout: PatchLayout) -> float:
        """Patch tokens that go through the blocks in all / patch tokens of the uniform grid."""
        ...


def select_tokens(tokens: Tokens, index: Tensor) -> Tokens:
    """Those of the packed tokens that are still to be computed.

    Args:
        tokens: (1, T, D).
        index: (R,) places in the packed sequence.
    """
    x, rotation = tokens.x.index_select(1, index), tokens.rotation
    if rotation is None:
        return Tokens(x)
    in_windows = None if rotation.in_windows is None else rotation.in_windows.index_select(-2, index)
    return Tokens(x, Rotation(rotation.globally.index_select(-2, index), in_windows))
