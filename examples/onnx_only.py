"""Classify an image with an exported graph: numpy, pillow and onnxruntime only.

aptvit export --model vit_base_patch16_384 --out exported
python examples/onnx_only.py exported photo.jpg
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def main(folder: Path, file: Path) -> None:
    exported = json.loads((folder / "export.json").read_text())
    height, width = exported["size"]
    image = Image.open(file).convert("RGB")
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height))).transpose(2, 0, 1)[None]
    logits, scales = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"image": pixels.copy()})
    # A patch of scale s covers 4^s cells
    tokens = round(float((0.25 ** scales.astype(float)).sum()))
    probabilities = np.exp(logits[0] - logits[0].max())
    print(f"{tokens} of {scales.size} patch tokens")
    for number in np.argsort(-probabilities)[:5]:
        print(f"class {number}: {probabilities[number] / probabilities.sum():.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
