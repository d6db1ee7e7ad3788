"""What a training minimises and reports: classification and distillation, detection, segmentation.

May import `aptvit.training`, `aptvit.dense` and all below them.
"""
