"""Adaptive patch sizes for pretrained Vision Transformers.

model = aptvit.adapt(timm.create_model("vit_base_patch16_384", pretrained=True), keep=0.5)
logits = model(images)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aptvit.budget import calibrate
    from aptvit.checkpoints import load_released_checkpoint, read_config
    from aptvit.features import PackedFeatures
    from aptvit.glance import fit_glance
    from aptvit.layout import PatchLayout
    from aptvit.model import AdaptivePatchTransformer, adapt, from_pretrained
    from aptvit.patch_pictures import show
    from aptvit.spread import fit_spread

__version__ = "0.1.0"

__all__ = [
    "AdaptivePatchTransformer",
    "PackedFeatures",
    "PatchLayout",
    "adapt",
    "calibrate",
    "fit_glance",
    "fit_spread",
    "from_pretrained",
    "load_released_checkpoint",
    "read_config",
    "show",
]

# torch and timm take seconds to import: what is in them is loaded when it is first used, `aptvit --help` needs neither.
_MODULES = {
    "AdaptivePatchTransformer": "model",
    "PackedFeatures": "features",
    "PatchLayout": "layout",
    "adapt": "model",
    "calibrate": "budget",
    "fit_glance": "glance",
    "fit_spread": "spread",
    "from_pretrained": "model",
    "load_released_checkpoint": "checkpoints",
    "read_config": "checkpoints",
    "show": "patch_pictures",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = globals()[name] = getattr(importlib.import_module(f"aptvit.{_MODULES[name]}"), name)
        return found
    if name in ("dense", "merging"):  # need libraries of their own, so they are imported when they are used
        return importlib.import_module(f"aptvit.{name}")
    if name == "vlm":
        try:
            return importlib.import_module("aptvit.vlm")
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise ImportError("vision language models need transformers: pip install 'aptvit[hf]'") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
