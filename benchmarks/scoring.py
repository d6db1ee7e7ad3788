"""How long scoring takes; interleaved, in one process.

python benchmarks/scoring.py            # against a loop of torch.histc; writes benchmarks/results/scoring-cpu.{json,md}
python benchmarks/scoring.py share      # of a model's forward; writes benchmarks/results/scoring-share-cpu.{json,md}
python benchmarks/scoring.py bands      # channels other than three; writes benchmarks/results/scoring-bands.{json,md}
python benchmarks/scoring.py cuda DIR   # against a copy of the same bytes; writes DIR/scoring.{json,md}
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from skimage import color, data
from torch import Tensor

import aptvit
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.record import plain
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.measuring.tables import Columns, markdown_page, markdown_table
from aptvit.patching.entropy import EntropyScorer, entropy_maps
from aptvit.patching.kernels import has_numba
from aptvit.patching.patchifier import Patchifier
from aptvit.patching.scoring import LaplacianScorer, UpsampleScorer
from aptvit.storage.writing import write_json

RESULTS = Path(__file__).parent / "results"
ROUNDS = 9
REPEATS = 20  # calls in a row, on a GPU


def histc_loop(pixels: Tensor, patch_size: int, factors: list[int]) -> dict[int, Tensor]:
    """Entropy with one torch.histc for each patch, as the paper's released code computes it."""
    gray = 0.2989 * pixels[:, 0] + 0.5870 * pixels[:, 1] + 0.1140 * pixels[:, 2]
    maps = {}
    for factor in factors:
        side = factor * patch_size
        rows, cols = gray.shape[1] // side, gray.shape[2] // side
        scores = torch.empty(len(gray), rows, cols)
        for b in range(len(gray)):
            for r in range(rows):
                for c in range(cols):
                    patch = gray[b, r * side : (r + 1) * side, c * side : (c + 1) * side]
                    share = torch.histc(patch, bins=512, min=0, max=255) / side**2
                    scores[b, r, c] = -(share * torch.log2(share + 1e-10)).sum()
        maps[factor] = scores
    return maps


def photo_batch(images: int, side: int) -> Tensor:
    """Crops of real photos. (B, 3, side, side) on the 0..255 scale"""
    photos = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), data.hubble_deep_field()]
    rng = np.random.default_rng(0)
    crops = []
    for i in range(images):
        photo = photos[i % len(photos)]
        big = torch.from_numpy(photo).permute(2, 0, 1)[None].float()
        scale = max(1.0, 1.3 * side / min(photo.shape[:2]))
        big = torch.nn.functional.interpolate(big, scale_factor=scale, mode="bilinear", antialias=True)[0]
        y, x = (int(rng.integers(0, length - side + 1)) for length in big.shape[1:])
        crops.append(big[:, y : y + side, x : x + side])
    return torch.stack(crops).clamp(0, 255)


def entropy_without_numba(pixels: Tensor, patch_size: int, factors: list[int]) -> dict[int, Tensor]:
    """What `EntropyScorer` does where numba is not installed."""
    return entropy_maps(pixels, (2989.0, 5870.0, 1140.0), 0.0, 512 / 2550000, patch_size, factors, 512)


def measure_cpu() -> None:
    if not has_numba():
        raise SystemExit("numba is one side of this comparison: pip install 'aptvit[cpu]'")
    environment = prepare_machine("cpu")
    rows = []
    for images, side, patch, factors in ((32, 336, 14, [2, 4]), (8, 384, 16, [2]), (8, 384, 16, [2, 4])):
        pixels = photo_batch(images, side)
        scorers: dict[str, Callable[[Tensor, int, list[int]], dict[int, Tensor]]] = {
            "histc loop": histc_loop,
            "entropy": entropy_without_numba,
            "entropy, numba": EntropyScorer(),
            "laplacian": LaplacianScorer(),
            "upsample": UpsampleScorer(),
        }
        expected, found = (score(pixels, patch, factors) for score in (histc_loop, EntropyScorer()))
        runs = [partial(score, pixels, patch, factors) for score in scorers.values()]
        seconds = dict(zip(scorers, interleaved(runs, ROUNDS, "cpu", warmup=1), strict=True))
        ratios = {name: Ratio.of_rounds(seconds["histc loop"], seconds[name]) for name in ("entropy", "entropy, numba")}
        rows.append(
            {
                "images": images,
                "side": side,
                "patch_size": patch,
                "factors": factors,
                "median_ms_per_image": {k: 1e3 * statistics.median(v) / images for k, v in seconds.items()},
                "least_ms_per_image": {k: 1e3 * min(v) / images for k, v in seconds.items()},
                "faster_than_histc_loop": {k: [r.least, r.median, r.most] for k, r in ratios.items()},
                "largest_difference_bits": max(float((expected[f] - found[f]).abs().max()) for f in factors),
            }
        )
    write(RESULTS / "scoring-cpu", "cpu", environment, rows)


# What part of a forward pass is it?


def measure_share() -> None:
    """Scoring beside the uniform model's forward pass, for scorers that models make too. Weights do not matter."""
    environment = prepare_machine("cpu")
    rows = []
    for name in ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_384"):
        vit = timm.create_model(name).eval().requires_grad_(False)
        images = photo_batch(8, vit.patch_embed.img_size[0]) / 127.5 - 1
        for scorer in ("entropy", "embedding", "glance"):
            model = aptvit.adapt(vit, keep=0.5, scorer=scorer)
            if scorer == "glance":
                aptvit.fit_glance(model, images, epochs=1)
            runs = (partial(model.patchifier.scores, images), partial(vit, images))
            with torch.inference_mode():
                share = Ratio.of_rounds(*interleaved(runs, ROUNDS, "cpu", warmup=2))
            rows.append({"model": name, "scorer": scorer, "share_of_forward": plain(share)})
            print(rows[-1])
    write(RESULTS / "scoring-share-cpu", "share", environment, rows)


# How to read channels other than three


def measure_bands() -> None:
    """The detail that merging takes from bands whose detail is at different places, by how channels are read."""
    photos = photo_batch(40, 224)
    lab = torch.from_numpy(color.rgb2lab(photos.permute(0, 2, 3, 1).numpy() / 255)).permute(0, 3, 1, 2)
    saturation = photos.amax(1, keepdim=True) - photos.amin(1, keepdim=True)
    bands = torch.cat([photos, saturation, lab[:, 1:].float() + 128], dim=1)
    sets = {"R, G, B, saturation, a, b": [0, 1, 2, 3, 4, 5], "b, G, saturation, R": [5, 1, 3, 0], "a, b": [4, 5]}
    rows = []
    for name, chosen in sets.items():
        pixels = bands[:, chosen]
        detail = _of_each_channel(UpsampleScorer(), pixels).flatten(2)
        for scorer in (EntropyScorer(), LaplacianScorer()):
            each, gray = _of_each_channel(scorer, pixels), pixels.mean(1, keepdim=True)
            readings = {"first channel": each[:, 0], "mean of channels": scorer(gray, 16, [2])[2]}
            readings |= {"mean of scores": each.mean(1), "largest score": each.amax(1)}
            for reading, scores in readings.items():
                order = scores.flatten(1).argsort(dim=1, stable=True)
                merged = order[:, : round(0.5 * 196 / 3)]  # half of the tokens are kept
                lost = detail.gather(2, merged[:, None].expand(-1, len(chosen), -1)).sum((0, 2)) / detail.sum((0, 2))
                row = {"bands": name, "scorer": scorer.name, "reading": reading}
                rows.append(row | {"lost_mean": float(lost.mean()), "lost_worst": float(lost.max())})
    write(RESULTS / "scoring-bands", "bands", prepare_machine("cpu"), rows)


def _of_each_channel(scorer: Any, pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, h, w) scores of 2x patches of each channel by itself."""
    return torch.stack([scorer(channel[:, None], 16, [2])[2] for channel in pixels.unbind(1)], dim=1)


# On a GPU: as fast as memory?


def measure_cuda(folder: Path) -> None:
    """Bytes per second of scoring raw uint8 images, and of a device-to-device copy of the same bytes."""
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    rows = []
    for images, side, patch, scales in ((64, 336, 14, 2), (256, 336, 14, 3), (64, 384, 16, 2), (16, 1024, 16, 3)):
        pixels = photo_batch(8, side).round().byte().repeat(images // 8, 1, 1, 1)
        rows.append(_against_copy(pixels, patch, scales))
    write(folder / "scoring", "cuda", prepare_machine("cuda"), rows, str(folder))


def _against_copy(pixels: Tensor, patch_size: int, scales: int) -> dict[str, Any]:
    """pixels: (B, 3, H, W) uint8 on the CPU."""
    patchifier = Patchifier(patch_size, scales=scales)
    there = pixels.cuda()
    target = torch.empty_like(there)
    ((_, scores),) = patchifier.scores(there)
    ((_, expected),) = patchifier.scores(pixels[:8])  # the batch is these, repeated
    difference = max(float((scores[f][:8].cpu() - expected[f]).abs().max()) for f in expected)
    runs = (partial(_repeat, partial(patchifier.scores, there)), partial(_repeat, partial(target.copy_, there)))
    scoring, copying = interleaved(runs, ROUNDS, "cuda", warmup=1)
    moved = REPEATS * pixels.numel() / 1e9
    return {
        "images": len(pixels),
        "side": pixels.shape[-1],
        "patch_size": patch_size,
        "scales": scales,
        "gb_per_s_scoring": moved / statistics.median(scoring),
        "gb_per_s_copy": moved / statistics.median(copying),
        "copy_over_scoring": plain(Ratio.of_rounds(copying, scoring)),
        "ms_per_batch": 1e3 * statistics.median(scoring) / REPEATS,
        "largest_difference_bits": difference,
    }


def _repeat(run: Callable[[], Any]) -> None:
    """Many calls in a row, so that neither starting nor waiting counts."""
    for _ in range(REPEATS):
        run()


# What is written


def _batch(row: dict[str, Any]) -> str:
    return f"{row['images']} x {row['side']} px, patch {row['patch_size']}"


def _milliseconds(scorer: str) -> tuple[str, Callable[[dict[str, Any]], str]]:
    return scorer, lambda row: f"{row['median_ms_per_image'][scorer]:.2f} ({row['least_ms_per_image'][scorer]:.2f})"


def _faster(title: str, scorer: str) -> tuple[str, Callable[[dict[str, Any]], str]]:
    return title, lambda row: "{1:.1f}x ({0:.1f} to {2:.1f})".format(*row["faster_than_histc_loop"][scorer])


_DIFFERENCE = ("differs by at most", lambda row: f"{row['largest_difference_bits']:.4f} bits")
PAGES: dict[str, tuple[str, str, Columns]] = {
    "cpu": (
        "Scoring on the CPU",
        f"{ROUNDS} interleaved rounds, crops of real photos. Milliseconds per image, median (least).",
        (
            ("batch", _batch),
            ("scales", lambda row: str(row["factors"])),
            *map(_milliseconds, ("histc loop", "entropy", "entropy, numba", "laplacian", "upsample")),
            _faster("entropy is faster by", "entropy"),
            _faster("with numba by", "entropy, numba"),
            _DIFFERENCE,
        ),
    ),
    "share": (
        "Scoring as a part of the forward pass",
        f"float32, batches of 8, {ROUNDS} interleaved rounds: time of scoring over that of the uniform model's forward "
        "pass, median (least to most).",
        (
            ("model", lambda row: row["model"]),
            ("scorer", lambda row: row["scorer"]),
            ("share", lambda row: percent(Ratio(**row["share_of_forward"]))),
        ),
    ),
    "bands": (
        "Channels other than three",
        "Crops of real photos at 224 pixels, patches of 16, half of the tokens kept. Bands are made of the photos: "
        "their colours, the largest minus the smallest of these, and a and b of Lab. Detail of a patch in a band is "
        "its error after halving and enlarging; lost is the part of it in merged patches, mean and worst band.",
        (
            ("bands", lambda row: row["bands"]),
            ("scorer", lambda row: row["scorer"]),
            ("what is scored", lambda row: row["reading"]),
            ("lost, mean", lambda row: f"{100 * row['lost_mean']:.1f} %"),
            ("lost, worst band", lambda row: f"{100 * row['lost_worst']:.1f} %"),
        ),
    ),
    "cuda": (
        "Scoring on a GPU",
        f"{ROUNDS} interleaved rounds of {REPEATS} calls, crops of real photos as uint8. GB/s of the batch's bytes, "
        "each counted once: a copy reads and writes them, scoring only reads them. Beside the scores of the CPU.",
        (
            ("batch", _batch),
            ("scales", lambda row: str(row["scales"])),
            ("ms per batch", lambda row: f"{row['ms_per_batch']:.3f}"),
            ("scoring, GB/s", lambda row: f"{row['gb_per_s_scoring']:.0f}"),
            ("copy, GB/s", lambda row: f"{row['gb_per_s_copy']:.0f}"),
            ("scoring is a copy's speed times", lambda row: f"{Ratio(**row['copy_over_scoring']):.2f}"),
            _DIFFERENCE,
        ),
    ),
}


def percent(ratio: Ratio) -> str:
    return f"{100 * ratio.median:.2f} % ({100 * ratio.least:.2f} to {100 * ratio.most:.2f})"


def as_markdown(record: dict[str, Any], kind: str) -> str:
    title, about, columns = PAGES[kind]
    labels = ("device", "torch", "threads", "machine")  # of files of before
    environment = record.get("environment") or {label: record[label] for label in labels if label in record}
    return markdown_page(title, [record["command"]], environment, about, markdown_table(columns, record["rows"]))


def write(path: Path, kind: str, environment: dict[str, str], rows: list[dict[str, Any]], *arguments: str) -> None:
    """Write PATH.json and PATH.md, and print the page."""
    words = ["python", "benchmarks/scoring.py", *([] if kind == "cpu" else [kind]), *arguments]
    record = {"command": " ".join(words), "environment": environment, "rounds": ROUNDS, "rows": rows}
    write_json(path.with_suffix(".json"), record, indent=1)
    page = as_markdown(record, kind)
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", nargs="?", choices=("loop", "share", "bands", "cuda"), default="loop")
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS / "gpu", help="of the results of cuda")
    options = parser.parse_args()
    if options.against == "cuda":
        measure_cuda(options.folder)
    elif options.against == "share":
        measure_share()
    elif options.against == "bands":
        measure_bands()
    else:
        measure_cpu()


if __name__ == "__main__":
    main()
