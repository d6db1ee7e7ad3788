"""Images, clips and text from disk; independent of models.

May import `aptvit.measuring`, `aptvit.storage` and, for transforms and names of classes, `timm.data`.
"""
