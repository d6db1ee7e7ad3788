"""Write the photos that scikit-image and scikit-learn install into a folder: python examples/sample_photos.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images


def sample_photos() -> dict[str, np.ndarray]:
    """Photos by name, (H, W, 3) uint8."""
    photos = {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")}
    photos["camera"] = np.stack([data.camera()] * 3, axis=-1)
    photos["motorcycle"] = data.stereo_motorcycle()[0]
    china, flower = load_sample_images().images
    return {**photos, "china": china, "flower": flower}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, photo in sample_photos().items():
        Image.fromarray(photo).save(folder / f"{name}.png")


if __name__ == "__main__":
    main()
