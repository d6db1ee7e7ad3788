"""A uniform model and its adaptive form side by side, on photos and on clips.

May import `aptvit.training`, `aptvit.report` and all below them.
"""

from aptvit.compare.clips import ClipRow, compare_clips
from aptvit.compare.comparison import compare
from aptvit.files.batches import LoadedImages, NormalisedBatches, read_images

__all__ = ["ClipRow", "LoadedImages", "NormalisedBatches", "compare", "compare_clips", "read_images"]
