"""Sample photos, which scikit-image and scikit-learn install."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from aptvit.storage.writing import replacing

__all__ = ["sample_photos", "write_sample_photos"]


def sample_photos() -> dict[str, np.ndarray]:
    """Nine photos by name, (H, W, 3) uint8.

    Raises:
        ValueError: If scikit-image or scikit-learn is not installed.
    """
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ValueError(
            f"the example photos come with scikit-image and scikit-learn ({error}): pip install 'aptvit[demo]', "
            "or name photos of your own"
        ) from None
    photos = {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")}
    photos["camera"] = np.stack([data.camera()] * 3, axis=-1)
    photos["motorcycle"] = data.stereo_motorcycle()[0]
    china, flower = load_sample_images().images
    return {**photos, "china": china, "flower": flower}


def write_sample_photos(folder: Path) -> list[Path]:
    """Write the photos as PNG files and return their paths.

    Args:
        folder: The folder to write to; made if it does not exist.

    Raises:
        ValueError: As for `sample_photos`.
    """
    photos = sample_photos()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, photo in photos.items():
        paths.append(folder / f"{name}.png")
        with replacing(paths[-1]) as draft:
            Image.fromarray(photo).save(draft)
    return paths
