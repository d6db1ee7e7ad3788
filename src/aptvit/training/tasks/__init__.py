"""Tasks of trainings, with their losses and metrics: classification and distillation, detection, segmentation.

May import `aptvit.training`, `aptvit.dense` and all below them.
"""
