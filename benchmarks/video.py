"""Clips: what reuse between frames saves, and how far answers drift from those of single frames.

    python benchmarks/video.py data/photos --model vit_tiny_patch16_224 --checkpoint weights.safetensors

Three motions, made of each photo: a still camera with sensor noise before which something moves, a slow pan, and a
zoom; and the clips that gradio installs. Time from frames in memory to logits beside the adaptive model frame by frame,
and beside the uniform model, in one process, in turn. Writes results/video-<device>.{json,md}.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

import aptvit
from aptvit.compare.clips import compare_clips
from aptvit.files.clips import read_clip
from aptvit.files.images import find_images, open_image
from aptvit.files.sample_photos import sample_photos
from aptvit.hosts.pretrained import evaluation_transform, load_host
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.rounds import Ratio
from aptvit.measuring.tables import Columns, markdown_page, markdown_table
from aptvit.storage.writing import write_json

RESULTS = Path(__file__).parent / "results"
MOTIONS = ("still camera, something moves", "slow pan", "zoom")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path, help="scikit-image's and scikit-learn's unless some are given")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--keep", type=float, default=0.67)
    parser.add_argument("--tolerance", type=float, nargs="*", default=[1.0, 2.0, 4.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    environment = prepare_machine(options.device)
    host = load_host(options.model, options.checkpoint)
    model = aptvit.adapt(host.model, scorer="entropy").to(options.device).eval()
    size = host.data["input_size"][1]
    photos = read(options.photos, size, options.clips)
    aptvit.calibrate(model, [resized(one, size).to(options.device) for one in photos], keep=options.keep)
    clips = {motion: [make_clip(photo, motion, options.frames, size) for photo in photos] for motion in MOTIONS}
    clips |= {name: [clip] for name, clip in real_clips(host.data, options.frames).items()}
    rows = []
    for name, some in clips.items():
        there = [clip.to(options.device) for clip in some]
        found = compare_clips(host.model.to(options.device), model, there, options.tolerance, options.rounds)
        rows += [{"clip": name, **asdict(row)} for row in found]
    record = {
        "command": shlex.join(["python", "benchmarks/video.py", *sys.argv[1:]]),
        "environment": environment,
        "model": options.model,
        "weights": "random" if host.weights == "random" else "trained",
        "frames": options.frames,
        "photos": len(photos),
        "keep": options.keep,
        "rows": rows,
    }
    name = f"video-{torch.device(options.device).type}"
    write_json(options.out / f"{name}.json", record, indent=1)
    (options.out / f"{name}.md").write_text(as_markdown(record), encoding="utf-8")
    print(as_markdown(record))


def read(paths: list[Path], size: int, count: int) -> list[Tensor]:
    """Photos of at least twice the size, (3, H, W) uint8."""
    opened = map(open_image, find_images(paths)) if paths else map(Image.fromarray, sample_photos().values())
    large = [one for one in map(pil_to_tensor, opened) if min(one.shape[1:]) >= 1.5 * size]
    return large[:: max(1, len(large) // count)][:count]


def resized(image: Tensor, size: int) -> Tensor:
    """The middle of a photo, (3, size, size)."""
    side = min(image.shape[1:])
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    square = image[None, :, top : top + side, left : left + side].float()
    return F.interpolate(square, (size, size), mode="area")[0].round().to(torch.uint8)


def make_clip(photo: Tensor, motion: str, frames: int, size: int) -> Tensor:
    """(T, 3, size, size) uint8."""
    if motion == MOTIONS[0]:
        clip = resized(photo, size).repeat(frames, 1, 1, 1).int()
        noise = torch.Generator().manual_seed(0)
        clip += torch.randn(clip.shape, generator=noise).mul(1.0).round().int()
        side, patch = size // 5, resized(photo.flip(2), size)
        for time in range(frames):
            left = (size - side) * time // max(frames - 1, 1)
            clip[time, :, size // 2 : size // 2 + side, left : left + side] = patch[:, :side, :side].int()
        return clip.clamp(0, 255).to(torch.uint8)
    side = int(min(photo.shape[1:]) * 0.7)
    parts = []
    for time in range(frames):
        share = time / max(frames - 1, 1)
        if motion == MOTIONS[1]:
            top, left, width = 0, int(share * (photo.shape[2] - side) * 0.2), side
        else:
            width = int(side * (1 - 0.3 * share))
            top = left = (side - width) // 2
        parts.append(resized(photo[:, top : top + width, left : left + width], size))
    return torch.stack(parts)


def real_clips(data: dict[str, Any], frames: int) -> dict[str, Tensor]:
    """The clips that gradio installs, by name."""
    import gradio

    folder = Path(gradio.__file__).parent / "media_assets" / "videos"
    return {
        f"gradio's {name}.mp4": read_clip(folder / f"{name}.mp4", evaluation_transform(data), frames)
        for name in ("a", "b")
    }


def as_markdown(record: dict[str, Any]) -> str:
    about = (
        f"{record['model']}, {record['weights']} weights; {record['frames']} frames; {record['photos']} clips made of "
        f"photos for each motion; thresholds that keep {record['keep']:.0%} of the photos' tokens. Agreement and "
        "divergence (nats) are with the same adaptive model frame by frame."
    )
    columns: Columns = (
        ("clip", lambda row: row["clip"]),
        ("tolerance", lambda row: f"{row['tolerance']:g}"),
        ("tokens (frame by frame)", lambda row: f"{row['tokens']:.0%} ({row['tokens_alone']:.0%})"),
        ("agreement", lambda row: f"{row['agreement']:.1%}"),
        ("divergence", lambda row: f"{row['divergence']:.4f}"),
        ("speed-up", lambda row: f"{Ratio(**row['speedup']):.2f}"),
        ("beside uniform", lambda row: f"{row['speedup_uniform']['median']:.2f}"),
    )
    table = markdown_table(columns, record["rows"])
    return markdown_page("Clips", [record["command"]], record["environment"], about, table)


if __name__ == "__main__":
    main()
