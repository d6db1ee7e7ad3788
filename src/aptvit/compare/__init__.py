"""Comparisons of a uniform model and its adaptive form, on images and on clips.

May import `aptvit.training`, `aptvit.report` and all below them.
"""
