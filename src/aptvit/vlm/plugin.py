"""What lmms-eval finds through the entry point of this package; the model itself imports lmms-eval, so it is apart."""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """The name that ``lmms_eval --model`` knows `aptvit.vlm.harness.AptvitLlava` by."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="aptvit_llava", simple_class_path="aptvit.vlm.harness.AptvitLlava")
