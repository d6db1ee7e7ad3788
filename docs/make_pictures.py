"""Draw the images of README and docs from photos that scikit-image and scikit-learn install.

    python docs/make_pictures.py

The screenshot of the demo page needs Chromium, and the checkpoint of ViT-Ti/16 that `benchmarks/data.py` fetches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from aptvit.demo.demo_model import DemoModel
from aptvit.demo.server import serve
from aptvit.report.drawing import side_by_side

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
SHOWN = ("china", "astronaut", "rocket")
CHECKPOINT = Path(os.environ.get("APTVIT_DATA", ROOT / "data")) / "vit_tiny" / "vit_tiny_patch16_224.safetensors"


def main() -> None:
    draw_patches()
    take_screenshot()


def draw_patches() -> None:
    """Three photos side by side with half of their patches, for README."""
    with tempfile.TemporaryDirectory() as folder:
        photos, patches = Path(folder) / "photos", Path(folder) / "patches"
        subprocess.run([sys.executable, ROOT / "examples" / "sample_photos.py", photos], check=True)
        square = [_square(photos / f"{name}.png") for name in SHOWN]
        show = ["aptvit", "show", *square, "--longer-side", "384", "--keep", "0.5", "--per-image", "--out", patches]
        subprocess.run([Path(sys.executable).with_name(str(show[0])), *show[1:]], check=True)
        drawn = [Image.open(patches / f"{name}.png").convert("RGB") for name in SHOWN]
        side_by_side(drawn).save(IMAGES / "patches.jpg", quality=85)


def _square(path: Path) -> Path:
    """Cut the middle square out of a photo, in place."""
    image = Image.open(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image.crop((left, top, left + side, top + side)).save(path)
    return path


def take_screenshot() -> None:
    """The demo page after a photo was chosen and the slider moved; left as it is where something is missing."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None or not CHECKPOINT.is_file():
        print(f"demo.png is left as it is: Chromium or {CHECKPOINT} is missing", file=sys.stderr)
        return
    with serve(DemoModel("vit_tiny_patch16_224", CHECKPOINT)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1130})
        page.goto(address)
        page.wait_for_selector("#speedup")
        page.locator(".gallery-item").nth(2).click()  # the cup
        page.wait_for_timeout(3000)
        page.locator("#keep input[type=range]").fill("0.4")
        page.wait_for_timeout(3000)
        page.wait_for_selector("#times:not(:has(.aptvit-outdated)) #speedup")
        page.screenshot(path=IMAGES / "demo.png")
        browser.close()


if __name__ == "__main__":
    main()
