"""Speed of adaptive models against their uniform hosts, case by case, for inference and for training.

May import `aptvit.training`, `aptvit.report` and all below them.
"""
