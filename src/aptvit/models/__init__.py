"""Adaptive models around hosts of timm and of transformers, and their files.

May import `aptvit.scorers`, `aptvit.encoder`, `aptvit.hosts`, `aptvit.layers` and `aptvit.patching`.
"""
