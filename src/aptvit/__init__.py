"""Adaptive patch sizes for pretrained Vision Transformers.

model = aptvit.adapt(timm.create_model("vit_base_patch16_384", pretrained=True), keep=0.5)
logits = model(images)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aptvit.api import adapt, from_pretrained
    from aptvit.calibration.calibrator import calibrate
    from aptvit.models.adaptive_vit import AdaptivePatchTransformer
    from aptvit.models.checkpoints import load_released_checkpoint, read_config
    from aptvit.patching.features import PackedFeatures
    from aptvit.patching.layout import PatchLayout
    from aptvit.report.patches import show
    from aptvit.scorers.glance import fit_glance
    from aptvit.scorers.harm import fit_harm
    from aptvit.scorers.spread import fit_spread

__version__ = "0.1.0"

__all__ = [
    "AdaptivePatchTransformer",
    "PackedFeatures",
    "PatchLayout",
    "adapt",
    "calibrate",
    "fit_glance",
    "fit_harm",
    "fit_spread",
    "from_pretrained",
    "load_released_checkpoint",
    "read_config",
    "show",
]

# torch and timm take seconds to import: what is in them is loaded when it is first used, `aptvit --help` needs neither.
_MODULES = {
    "AdaptivePatchTransformer": "models.adaptive_vit",
    "PackedFeatures": "patching.features",
    "PatchLayout": "patching.layout",
    "adapt": "api",
    "calibrate": "calibration.calibrator",
    "fit_glance": "scorers.glance",
    "fit_harm": "scorers.harm",
    "fit_spread": "scorers.spread",
    "from_pretrained": "api",
    "load_released_checkpoint": "models.checkpoints",
    "read_config": "models.checkpoints",
    "show": "report.patches",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = globals()[name] = getattr(importlib.import_module(f"aptvit.{_MODULES[name]}"), name)
        return value
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
