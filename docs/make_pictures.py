"""Draw the README's pictures from photos that scikit-image and scikit-learn install: python docs/make_pictures.py"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from aptvit.report.drawing import side_by_side

ROOT = Path(__file__).parent.parent
SHOWN = ("china", "astronaut", "rocket")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        photos, patches = Path(folder) / "photos", Path(folder) / "patches"
        subprocess.run([sys.executable, ROOT / "examples" / "sample_photos.py", photos], check=True)
        square = [_square(photos / f"{name}.png") for name in SHOWN]
        show = ["aptvit", "show", *square, "--img-size", "384", "--keep", "0.5", "--per-image", "--out", patches]
        subprocess.run([Path(sys.executable).with_name(str(show[0])), *show[1:]], check=True)
        drawn = [Image.open(patches / f"{name}.png").convert("RGB") for name in SHOWN]
        side_by_side(drawn).save(ROOT / "docs" / "images" / "patches.jpg", quality=85)


def _square(path: Path) -> Path:
    """Cut the middle square out of a photo, in place."""
    image = Image.open(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image.crop((left, top, left + side, top + side)).save(path)
    return path


if __name__ == "__main__":
    main()
