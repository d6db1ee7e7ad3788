"""timm's NaFlexVit on images of mixed shapes: packed, beside timm's padded batches, and with merged patches.

    python benchmarks/naflex.py

NaFlexVit-B/16 with random weights, photos of scikit-image and scikit-learn in memory as rows of patches, as timm's
collator makes them, to logits; CPU. "budget" resizes each photo to at most 256 patches at its own aspect ratio, as
NaFlex does; "native" takes crops of 96 to 512 px. Sides of a round run one after the other, in turned order.

Writes naflex-cpu.{json,md}.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from PIL import Image
from timm.models.naflexvit import batch_patchify
from torch import Tensor

import aptvit
from aptvit.files.sample_photos import sample_photos
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.record import Measurement, Record
from aptvit.measuring.rounds import Ratio, paired_rounds
from aptvit.measuring.tables import Columns, markdown_page, markdown_table

RESULTS = Path(__file__).parent / "results"
MODEL, PATCH, BUDGET = "naflexvit_base_patch16_gap", 16, 256
KEEPS = (1.0, 0.7, 0.5)


@dataclass(frozen=True)
class NaFlexRow(Measurement):
    """One share of the patch tokens on one set of images.

    Attributes:
        images: "budget" or "native".
        keep: Share of the patch tokens; 1 merges nothing.
        padding: Tokens of timm's padded batch over tokens of its images.
        seconds_padded: Seconds of each round of timm's model on its padded batch.
        seconds_packed: Seconds of the adaptive model in the same rounds.
    """

    identity: ClassVar[tuple[str, ...]] = ("images", "keep")

    images: str
    keep: float
    padding: float
    seconds_padded: tuple[float, ...]
    seconds_packed: tuple[float, ...]

    @property
    def speedup(self) -> Ratio:
        return Ratio.of_rounds(self.seconds_padded, self.seconds_packed)


class NaFlexRecord(Record[NaFlexRow]):
    row_type = NaFlexRow
    contents = "NaFlexVit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    made_by = shlex.join(["python", "benchmarks/naflex.py", *sys.argv[1:]])
    record = NaFlexRecord(prepare_machine("cpu"), [made_by])
    torch.manual_seed(0)
    host = timm.create_model(MODEL).eval()
    model = aptvit.adapt(host)
    for name in ("budget", "native"):
        batch, padding = as_batch(images_of(name))
        sides: list[Any] = [host, *(lambda x, keep=keep: model(x, keep=keep) for keep in KEEPS)]
        with torch.inference_mode():
            difference = float((sides[0](batch) - sides[1](batch)).abs().max())
            print(f"{name}: logits differ by {difference:.1e} with nothing merged")
            seconds = paired_rounds(sides, [batch], options.rounds, "cpu", warmup=1)
        for keep, times in zip(KEEPS, seconds[1:], strict=True):
            row = NaFlexRow(name, keep, padding, tuple(seconds[0]), tuple(times))
            record.put(row)
            print(f"{name}, keep {keep:g}: {row.speedup:.2f}", flush=True)
    record.save(RESULTS / "naflex-cpu.json")
    (RESULTS / "naflex-cpu.md").write_text(as_markdown(record), encoding="utf-8")


def images_of(name: str) -> list[Tensor]:
    """Photos at sides that are whole patches, in [-1, 1]. (3, H, W) each"""
    random, images = np.random.default_rng(0), []
    for number, photo in enumerate(sample_photos().values()):
        image = Image.fromarray(np.asarray(photo)).convert("RGB")
        aspect = (image.width / image.height) * (1, 2, 0.5)[number % 3]
        if name == "budget":
            rows = max(1, math.floor(math.sqrt(BUDGET / aspect)))
            grid = (rows, max(1, BUDGET // rows))
        else:
            grid = tuple(int(side) // PATCH for side in random.integers(96, 513, size=2))
        image = image.resize((grid[1] * PATCH, grid[0] * PATCH), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
    return images


def as_batch(images: list[Tensor]) -> tuple[dict[str, Tensor], float]:
    """timm's padded batch of patches, and its tokens over those of the images."""
    cut = [batch_patchify(image[None], (PATCH, PATCH)) for image in images]
    counts = [rows * cols for _, (rows, cols) in cut]
    batch = {
        "patches": torch.zeros(len(images), max(counts), cut[0][0].shape[2]),
        "patch_coord": torch.zeros(len(images), max(counts), 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(images), max(counts), dtype=torch.bool),
    }
    for number, (patches, (rows, cols)) in enumerate(cut):
        batch["patches"][number, : counts[number]] = patches[0]
        batch["patch_coord"][number, : counts[number]] = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
        batch["patch_valid"][number, : counts[number]] = True
    return batch, len(images) * max(counts) / sum(counts)


def as_markdown(record: NaFlexRecord) -> str:
    """The page of a record."""
    columns: Columns = (
        ("images", lambda row: row.images),
        ("tokens of the padded batch", lambda row: f"{row.padding:.2f}x"),
        ("keep", lambda row: f"{row.keep:g}"),
        ("times as fast as timm's padded batch", lambda row: f"{row.speedup:.2f}"),
    )
    return markdown_page("NaFlexVit", record.commands, record.environment, markdown_table(columns, record.measured))


if __name__ == "__main__":
    main()
