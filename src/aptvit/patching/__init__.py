"""Which patches is an image cut into? From pixels to a `PatchLayout`; may import torch, numpy and `aptvit.files`."""
