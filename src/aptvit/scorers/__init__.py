"""Scores through a model's eyes: its embedding, its attention, its answers; each in one file.

May import `aptvit.encoder`, `aptvit.hosts`, `aptvit.layers` and `aptvit.patching`.
"""

from __future__ import annotations

from aptvit.encoder.encoder import Encoder
from aptvit.patching.scoring import Scorer, get_scorer

__all__ = ["SCORERS", "make_scorer"]

SCORERS = ("embedding", "glance", "preview", "spread")
"""Names of scorers that read through a model.

- ``"embedding"``: how far a coarse patch lands from its base patches in the host's own embedding space;
- ``"glance"``: what the host will look at, see `aptvit.fit_glance`;
- ``"spread"``: where what a detector or segmenter says differs, see `aptvit.fit_spread`;
- ``"preview"``: the same, from reading all in 2x patches first, see `aptvit.scorers.preview`.
"""


def make_scorer(scorer: str | Scorer, encoder: Encoder) -> Scorer:
    """The scorer of a name, or the callable itself.

    Args:
        scorer: A name, or a callable.
        encoder: Of the model, for the scorers that need it.

    Raises:
        ValueError: If there is no scorer of this name.
    """
    if scorer == "embedding":
        from aptvit.scorers.embedding import EmbeddingScorer

        return EmbeddingScorer(encoder.derived.maps_for_scoring)
    if scorer == "glance":
        from aptvit.scorers.glance import GlanceScorer

        return GlanceScorer.of_encoder(encoder)
    if scorer == "spread":
        from aptvit.scorers.spread import SpreadScorer

        return SpreadScorer.of_encoder(encoder)
    if scorer == "preview":
        from aptvit.scorers.preview import PreviewScorer

        return PreviewScorer(encoder)
    return get_scorer(scorer, SCORERS)
