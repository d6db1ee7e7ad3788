"""From pixels to a `PatchLayout`: which patches images are cut into. May import torch, numpy and `aptvit.files`."""
