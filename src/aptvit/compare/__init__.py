"""A uniform model and its adaptive form side by side, on images and on clips.

May import `aptvit.training`, `aptvit.report` and all below them.
"""
