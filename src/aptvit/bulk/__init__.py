"""Features or predictions of millions of images, written to Parquet files, in one process or on a Ray cluster.

listing ── parts of a few hundred images ── read and decoded ── packs of a token budget ── part-00000.parquet ...

A job that was killed at any time continues from its finished parts: no image is missing or duplicated.

May import `aptvit.training`, `aptvit.report` and all below them.
"""

from aptvit.bulk.embedder import Embedder, Options
from aptvit.bulk.job import Job
from aptvit.bulk.listing import Entry, list_images
from aptvit.bulk.run import run_here, run_on_ray

__all__ = ["Embedder", "Entry", "Job", "Options", "list_images", "run_here", "run_on_ray"]
