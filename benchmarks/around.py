"""Models with a ViT inside, whole and their encoder alone: adaptive beside uniform, end to end, on the CPU.

    python benchmarks/around.py                             # all; half an hour
    python benchmarks/around.py --hosts depth-s-518 rf-detr

Published shapes with random weights, on photos of scikit-image and scikit-learn, normalised images in memory to the
host's output. The encoder is the module that holds embeddings and layers, scoring and layout included in its time.
eta = (time uniform / time adaptive) / (FLOPs uniform / FLOPs adaptive), in paired rounds of one process.

Writes around-cpu.{json,md}; what the file holds already is not run again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

import aptvit
from aptvit.files.sample_photos import sample_photos
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.operations import mean_gflops
from aptvit.measuring.record import Measurement, Record
from aptvit.measuring.rounds import Paired, paired_rounds
from aptvit.measuring.tables import Columns, markdown_page, markdown_table

RESULTS = Path(__file__).parent / "results"
KEEPS = (0.7, 0.5, 0.35)
SIZES = {"s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24)}  # width, heads, layers


@dataclass(frozen=True)
class HostRow(Paired, Measurement):
    """One host at one share, whole or its encoder.

    Attributes:
        host: A key of `HOSTS`.
        part: "whole" or "encoder".
        keep: Share of the patch tokens.
        tokens: Tokens of the adaptive model over those of the uniform one, prefix tokens included.
    """

    identity: ClassVar[tuple[str, ...]] = ("host", "part", "keep")

    host: str = ""
    part: str = ""
    keep: float = 0.0
    tokens: float = 0.0


class HostRecord(Record[HostRow]):
    row_type = HostRow
    contents = "models with a ViT inside"


def _vit(size: str) -> dict[str, int]:
    width, heads, layers = SIZES[size]
    return {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}


def depth(size: str) -> Any:
    """Depth Anything V2."""
    necks = {"s": [48, 96, 192, 384], "b": [96, 192, 384, 768]}[size]
    backbone = transformers.Dinov2Config(
        **_vit(size), image_size=518, patch_size=14, out_indices=[3, 6, 9, 12], reshape_hidden_states=False
    )
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=SIZES[size][0],
            neck_hidden_sizes=necks,
            fusion_hidden_size={"s": 64, "b": 128}[size],
        )
    )


def rf_detr() -> Any:
    """RF-DETR-base: DINOv2-small at 560 px, four windows along a side."""
    backbone = transformers.RfDetrDinov2Config(
        **_vit("s"), image_size=518, patch_size=14, num_windows=4, out_indices=[2, 5, 8, 11]
    )
    return transformers.RfDetrForObjectDetection(transformers.RfDetrConfig(backbone_config=backbone))


def eomt() -> Any:
    """EoMT-L at 640 px."""
    host = transformers.EomtForUniversalSegmentation(
        transformers.EomtConfig(**_vit("l"), image_size=640, patch_size=16, num_blocks=4, num_queries=100)
    )
    host.attn_mask_probs.fill_(0.0)  # as after training, which anneals the masks away
    return host


def video_mae() -> Any:
    """VideoMAE-B on 16 frames."""
    return transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**_vit("b"), num_labels=400))


HOSTS: dict[str, tuple[Callable[[], Any], int]] = {
    "depth-s-518": (lambda: depth("s"), 518),
    "depth-s-1022": (lambda: depth("s"), 1022),
    "depth-b-518": (lambda: depth("b"), 518),
    "depth-b-1022": (lambda: depth("b"), 1022),
    "rf-detr-base-560": (rf_detr, 560),
    "eomt-l-640": (eomt, 640),
    "videomae-b-16": (video_mae, 224),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=HOSTS)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    made_by = shlex.join(["python", "benchmarks/around.py", *sys.argv[1:]])
    file, page = (RESULTS / f"around-cpu.{ending}" for ending in ("json", "md"))
    environment = {**prepare_machine("cpu"), "transformers": transformers.__version__}
    record = HostRecord.resume(file, environment, made_by, False)
    done = {(row.host, row.part, row.keep) for row in record.measured}
    for name in options.hosts:
        if all((name, part, keep) in done for part in ("whole", "encoder") for keep in KEEPS):
            continue
        for row in measure(name, options.images, options.rounds):
            record.put(row)
            print(
                f"{row.host} {row.part} {row.keep}: {row.speedup:.2f}, {row.flop_ratio:.2f}, {row.eta:.2f}", flush=True
            )
        record.save(file)
        page.write_text(as_markdown(record), encoding="utf-8")


@torch.inference_mode()
def measure(name: str, count: int, rounds: int) -> list[HostRow]:
    """All shares of a host, whole and its encoder, in the same rounds."""
    build, side = HOSTS[name]
    torch.manual_seed(0)
    host = build().eval()
    model = aptvit.adapt(host, keep=0.5, check=False)
    batches = [images_of(side, count)[number : number + 1] for number in range(count)]
    if model.aptvit.inner.depth > 1:
        batches = [batch[:, None].expand(-1, 16, -1, -1, -1).contiguous() for batch in batches]
    core, adaptive_core = host.get_submodule(model.aptvit.inner.core_name), model.aptvit.inner.core
    parts: dict[str, Any] = {"whole": (host, lambda x, keep: model(x, keep=keep))}
    if core is not host:
        parts["encoder"] = (core, lambda x, keep: _within(model, adaptive_core, x, keep))
    rows = []
    for part, (uniform, adaptive) in parts.items():
        sides = [uniform, *(lambda x, keep=keep, run=adaptive: run(x, keep) for keep in KEEPS)]
        gflops = [mean_gflops(host, run, batches, "cpu") for run in sides]
        seconds = paired_rounds(sides, batches, rounds, "cpu", warmup=1)
        for keep, times, operations in zip(KEEPS, seconds[1:], gflops[1:], strict=True):
            layouts = [model.aptvit.layout(batch, keep=keep) for batch in batches]
            kept = sum(layout.num_patches for layout in layouts) / sum(layout.scale_map.numel() for layout in layouts)
            rows.append(
                HostRow(
                    images=count,
                    gflops_uniform=gflops[0],
                    gflops_adaptive=operations,
                    seconds_uniform=tuple(seconds[0]),
                    seconds_adaptive=tuple(times),
                    host=name,
                    part=part,
                    keep=keep,
                    tokens=kept,
                )
            )
    return rows


def _within(model: Any, core: Any, images: Tensor, keep: float) -> Any:
    with model.aptvit.calling(keep=keep):
        return core(images)


def images_of(side: int, count: int) -> Tensor:
    """Photos as squares, normalised with the statistics of ImageNet. (count, 3, side, side)"""
    images = []
    for photo in list(sample_photos().values())[:count]:
        image = Image.fromarray(np.asarray(photo)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.stack(images).float() / 255 - mean) / std


def as_markdown(record: HostRecord) -> str:
    """The page of a record."""
    columns: Columns = (
        ("host, px", lambda row: row.host),
        ("part", lambda row: row.part),
        ("tokens", lambda row: f"{row.tokens:.0%}"),
        ("s per image, uniform", lambda row: f"{1 / row.throughput_uniform:.3f}"),
        ("speed-up", lambda row: f"{row.speedup:.2f}"),
        ("FLOP ratio", lambda row: f"{row.flop_ratio:.2f}"),
        ("eta", lambda row: f"{row.eta:.2f}"),
    )
    note = "Batches of one image or clip. Speed-ups are medians over rounds, with the least and the most.\n"
    table = markdown_table(columns, list(record.measured))
    return markdown_page("Models with a ViT inside", record.commands, record.environment, note, table)


if __name__ == "__main__":
    main()
