"""Protocol of the results that a scorer computed with the blocks, for reuse by the encoder."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from aptvit.encoder.encoder import BlockOutputs, Encoder, Request, Tokens
from aptvit.layers.position_embed import Rotation
from aptvit.patching.layout import PatchLayout

__all__ = ["EncoderCache", "select_tokens"]


class EncoderCache(Protocol):
    """Results of the blocks from scoring, in ``layout.cache``; `run` computes the remaining tokens."""

    def run(self, encoder: Encoder, tokens: Tokens, layout: PatchLayout, request: Request) -> BlockOutputs:
        """As `Encoder.run`, with the outputs of all tokens of the layout."""
        ...

    def tensors(self) -> list[Tensor]:
        """All tensors of the cache."""
        ...

    def read_ratio(self, layout: PatchLayout) -> float:
        """All patch tokens that go through the blocks / patch tokens of the uniform grid."""
        ...


def select_tokens(tokens: Tokens, index: Tensor) -> Tokens:
    """Select packed tokens, with their rotary embeddings.

    Args:
        tokens: (1, T, D).
        index: (R,) positions in the packed sequence.

    Returns:
        (1, R, D).
    """
    x, rotation = tokens.x.index_select(1, index), tokens.rotation
    if rotation is None:
        return Tokens(x)
    in_windows = None if rotation.in_windows is None else rotation.in_windows.index_select(-2, index)
    return Tokens(x, Rotation(rotation.globally.index_select(-2, index), in_windows))
