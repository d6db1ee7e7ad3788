"""A uniform model and its adaptive form side by side, on photos and on clips.

May import `aptvit.training`, `aptvit.report` and all below them.
"""

from aptvit.compare.clips import ClipRow, compare_clips
from aptvit.compare.comparison import compare
from aptvit.files.photos import NormalisedBatches, Photos, read_photos

__all__ = ["ClipRow", "NormalisedBatches", "Photos", "compare", "compare_clips", "read_photos"]
