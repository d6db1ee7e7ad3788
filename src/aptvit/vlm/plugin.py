"""Entry point for lmms-eval, in a module of its own because the model's module imports lmms-eval."""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """The manifest that registers `aptvit.vlm.harness.AptvitLlava` as ``lmms_eval --model aptvit_llava``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="aptvit_llava", simple_class_path="aptvit.vlm.harness.AptvitLlava")
