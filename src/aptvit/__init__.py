"""Adaptive patch sizes for pretrained Vision Transformers.

model = aptvit.adapt(timm.create_model("vit_base_patch16_384", pretrained=True), keep=0.5)
logits = model(images)
"""

from typing import Any

from aptvit.budget import calibrate
from aptvit.checkpoints import load_released_checkpoint, read_config
from aptvit.features import PackedFeatures
from aptvit.glance import fit_glance
from aptvit.layout import PatchLayout
from aptvit.model import AdaptivePatchTransformer, adapt, from_pretrained

__version__ = "0.1.0"

__all__ = [
    "AdaptivePatchTransformer",
    "PackedFeatures",
    "PatchLayout",
    "adapt",
    "calibrate",
    "fit_glance",
    "from_pretrained",
    "load_released_checkpoint",
    "read_config",
]


def __getattr__(name: str) -> Any:
    if name == "merging":  # needs timm, so it is imported when it is used
        import importlib

        return importlib.import_module("aptvit.merging")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
