"""Adapt a model, ask for half of its tokens on average, look at what each photo got: python examples/quick_start.py

Weights are random here, so that it runs anywhere; with pretrained=True the logits mean something.
"""

from __future__ import annotations

import timm
import torch
from PIL import Image
from sample_photos import sample_photos

import aptvit


def main() -> None:
    vit = timm.create_model("vit_tiny_patch16_384", pretrained=False).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(vit), is_training=False)
    photos = sample_photos()
    images = torch.stack([transform(Image.fromarray(photo)) for photo in photos.values()])

    model = aptvit.adapt(vit, scales=3)
    thresholds = aptvit.calibrate(model, images, keep=0.5)
    print(f"thresholds {thresholds} keep {model.layout(images).keep_ratio:.1%} of the patch tokens")

    with torch.inference_mode():
        logits = model(images)
        maps = model.forward_intermediates(images, indices=[5, 11], intermediates_only=True)
    layout = model.layout(images)
    for i, name in enumerate(photos):
        sizes, counts = layout.patches(i)[:, 2].unique(return_counts=True)
        words = ", ".join(f"{n} of {size} px" for size, n in zip(sizes.tolist(), counts.tolist(), strict=True))
        print(f"{name:18} {layout.seqlens[i] - layout.num_prefix_tokens:4} patches: {words}")
    print(f"logits {tuple(logits.shape)}, feature maps {[tuple(m.shape) for m in maps]}")


if __name__ == "__main__":
    main()
