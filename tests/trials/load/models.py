"""The model of the trials: ViT-Ti for small images, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch

import aptvit

__all__ = ["make_model", "save_model"]


def make_model(keep: float = 0.5) -> Any:
    """An adaptive ViT-Ti/16 for 64 to 128 pixels."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 96, "num_classes": 10, "dynamic_img_size": True}
    host = timm.create_model("vit_tiny_patch16_224", **options).eval()
    with torch.no_grad():
        host.head.weight.normal_(std=1.0)
    return aptvit.adapt(host, keep=keep)


def save_model(folder: Path) -> Path:
    """Save the model in a folder, and return the folder."""
    make_model().save_pretrained(folder)
    return folder
