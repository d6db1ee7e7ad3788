"""Datasets on disk or on the hub: images with classes, boxes or masks, and which of them are for training.

May import `aptvit.files` and what is below it; independent of models.
"""
