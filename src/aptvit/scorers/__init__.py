"""Scorers that use the model itself: its embedding, its attention or its outputs; each in one file.

May import `aptvit.encoder`, `aptvit.hosts`, `aptvit.layers` and `aptvit.patching`.
"""

from __future__ import annotations

from aptvit.encoder.encoder import Encoder
from aptvit.patching.scoring import Scorer, get_scorer

__all__ = ["SCORERS", "make_scorer"]

SCORERS = ("embedding", "glance", "harm", "preview", "spread")
"""Names of scorers that need a model.

- ``"embedding"``: distance of a coarse patch's embedding from the mean of its base patches' embeddings;
- ``"glance"``: predicted attention of the class token, times that distance, see `aptvit.fit_glance`;
- ``"harm"``: predicted change of the model's answer by merging a patch, see `aptvit.fit_harm`;
- ``"spread"``: predicted variance of a detector's or segmenter's outputs inside a patch, see `aptvit.fit_spread`;
- ``"preview"``: that variance computed in a first pass over 2x patches, see `aptvit.scorers.preview`.
"""


def make_scorer(scorer: str | Scorer, encoder: Encoder) -> Scorer:
    """The scorer of a name, or the callable itself.

    Args:
        scorer: A name, or a callable.
        encoder: The model's encoder, for scorers that need a model.

    Raises:
        ValueError: If there is no scorer of this name.
    """
    if scorer == "embedding":
        from aptvit.scorers.embedding import EmbeddingScorer

        return EmbeddingScorer(encoder.derived.maps_for_scoring)
    if scorer == "glance":
        from aptvit.scorers.glance import GlanceScorer

        return GlanceScorer.of_encoder(encoder)
    if scorer == "harm":
        from aptvit.scorers.harm import HarmScorer

        return HarmScorer.of_encoder(encoder)
    if scorer == "spread":
        from aptvit.scorers.spread import SpreadScorer

        return SpreadScorer.of_encoder(encoder)
    if scorer == "preview":
        from aptvit.scorers.preview import PreviewScorer

        return PreviewScorer(encoder)
    return get_scorer(scorer, SCORERS)
