"""Patches, scores and predictions drawn on images, and the page of a comparison.

May import `aptvit.vlm`, `aptvit.dense`, `aptvit.merging`, `aptvit.calibration`, `aptvit.data`, and all below them.
"""

from aptvit.report.drawing import draw_patches, draw_scores, save_png, side_by_side
from aptvit.report.page import Comparison, ImageResult, summary_table, write_report
from aptvit.report.patches import show, show_patches

__all__ = [
    "Comparison",
    "ImageResult",
    "draw_patches",
    "draw_scores",
    "save_png",
    "show",
    "show_patches",
    "side_by_side",
    "summary_table",
    "write_report",
]
