"""How long scoring takes; interleaved, in one process.

python benchmarks/scoring.py            # against a loop of torch.histc; writes benchmarks/results/scoring-cpu.{json,md}
python benchmarks/scoring.py share      # of a model's forward; writes benchmarks/results/scoring-share-cpu.{json,md}
python benchmarks/scoring.py cuda DIR   # against a copy of the same bytes; writes DIR/scoring.{json,md}
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from skimage import data
from torch import Tensor

import aptvit
from aptvit.measuring.timing import Spread, describe_device, interleaved, keep_freed_memory
from aptvit.patching.entropy import EntropyScorer, entropy_maps
from aptvit.patching.kernels import has_numba
from aptvit.patching.patchifier import Patchifier
from aptvit.patching.scoring import LaplacianScorer, UpsampleScorer

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
    keep_freed_memory()
    rows = []
    for images, side, patch, factors in ((32, 336, 14, [2, 4]), (8, 384, 16, [2]), (8, 384, 16, [2, 4])):
        pixels = photo_batch(images, side)
        ways: dict[str, Callable[[Tensor, int, list[int]], dict[int, Tensor]]] = {
            "histc loop": histc_loop,
            "entropy": entropy_without_numba,
            "entropy, numba": EntropyScorer(),
            "laplacian": LaplacianScorer(),
            "upsample": UpsampleScorer(),
        }
        for way in ways.values():
            way(pixels, patch, factors)
        difference = max(
            float((histc_loop(pixels, patch, factors)[f] - EntropyScorer()(pixels, patch, factors)[f]).abs().max())
            for f in factors
        )
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = time.perf_counter()
                way(pixels, patch, factors)
                seconds[name].append(time.perf_counter() - start)
        ratios = {
            name: [loop / ours for loop, ours in zip(seconds["histc loop"], seconds[name], strict=True)]
            for name in ("entropy", "entropy, numba")
        }
        rows.append(
            {
                "images": images,
                "side": side,
                "patch_size": patch,
                "factors": factors,
                "median_ms_per_image": {k: 1e3 * statistics.median(v) / images for k, v in seconds.items()},
                "least_ms_per_image": {k: 1e3 * min(v) / images for k, v in seconds.items()},
                "faster_than_histc_loop": {
                    name: [min(ratio), statistics.median(ratio), max(ratio)] for name, ratio in ratios.items()
                },
                "largest_difference_bits": difference,
            }
        )
    record = {
        "command": "python benchmarks/scoring.py",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "rounds": ROUNDS,
        "rows": rows,
    }
    (RESULTS / "scoring-cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    table = _table(record)
    (RESULTS / "scoring-cpu.md").write_text(table)
    print(table)


def _table(record: dict) -> str:
    lines = [
        "# Scoring on the CPU",
        "",
        f"`{record['command']}`, torch {record['torch']}, {record['threads']} threads, {record['rounds']} interleaved "
        "rounds, crops of real photos. Milliseconds per image, median (least).",
        "",
        "| batch | scales | histc loop | entropy | entropy, numba | laplacian | upsample "
        "| entropy is faster by | with numba by | differs by at most |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        ms = [f"{m:.2f} ({row['least_ms_per_image'][k]:.2f})" for k, m in row["median_ms_per_image"].items()]
        faster = [
            f"{middle:.1f}x ({low:.1f} to {high:.1f})" for low, middle, high in row["faster_than_histc_loop"].values()
        ]
        lines.append(
            f"| {row['images']} x {row['side']} px, patch {row['patch_size']} | {row['factors']} | {' | '.join(ms)} | "
            f"{' | '.join(faster)} | {row['largest_difference_bits']:.4f} bits |"
        )
    return "\n".join(lines) + "\n"


# What part of a forward pass is it?


def measure_share() -> None:
    """Scoring beside the uniform model's forward pass, for scorers that models make too. Weights do not matter."""
    keep_freed_memory()
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
                interleaved(runs, 2, "cpu")
                share = Spread.of_ratios(*interleaved(runs, ROUNDS, "cpu"))
            rows.append({"model": name, "scorer": scorer, "share_of_forward": vars(share)})
            print(rows[-1])
    record = {"command": "python benchmarks/scoring.py share", "torch": torch.__version__, "rounds": ROUNDS}
    record |= {"threads": torch.get_num_threads(), "device": describe_device("cpu"), "rows": rows}
    (RESULTS / "scoring-share-cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "# Scoring as a part of the forward pass",
        "",
        f"`{record['command']}`, float32, batches of 8, {record['device']}, torch {record['torch']}, {ROUNDS} "
        "interleaved rounds: time of scoring over that of the uniform model's forward pass, median (least to most).",
        "",
        "| model | scorer | share |",
        "|---|---|---|",
    ]
    for row in rows:
        share = Spread(**row["share_of_forward"])
        told = f"{100 * share.median:.2f} % ({100 * share.least:.2f} to {100 * share.most:.2f})"
        lines.append(f"| {row['model']} | {row['scorer']} | {told} |")
    (RESULTS / "scoring-share-cpu.md").write_text("\n".join(lines) + "\n")


# On a GPU: as fast as memory?


def measure_cuda(folder: Path) -> None:
    """Bytes per second of scoring raw uint8 images, and of a device-to-device copy of the same bytes."""
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    rows = []
    for images, side, patch, scales in ((64, 336, 14, 2), (256, 336, 14, 3), (64, 384, 16, 2), (16, 1024, 16, 3)):
        pixels = photo_batch(8, side).round().byte().repeat(images // 8, 1, 1, 1)
        rows.append(_against_copy(pixels, patch, scales))
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python benchmarks/scoring.py cuda {folder}",
        "device": describe_device("cuda"),
        "torch": torch.__version__,
        "rounds": ROUNDS,
        "repeats": REPEATS,
        "rows": rows,
    }
    (folder / "scoring.json").write_text(json.dumps(record, indent=1) + "\n")
    table = _cuda_table(record)
    (folder / "scoring.md").write_text(table)
    print(table)


def _against_copy(pixels: Tensor, patch_size: int, scales: int) -> dict[str, Any]:
    """pixels: (B, 3, H, W) uint8 on the CPU."""
    patchifier = Patchifier(patch_size, scales=scales)
    there = pixels.cuda()
    target = torch.empty_like(there)
    ((_, scores),) = patchifier.scores(there)
    ((_, expected),) = patchifier.scores(pixels[:8])  # the batch is these, repeated
    difference = max(float((scores[f][:8].cpu() - expected[f]).abs().max()) for f in expected)
    runs = (partial(_repeat, partial(patchifier.scores, there)), partial(_repeat, partial(target.copy_, there)))
    interleaved(runs, 1, "cuda")
    scoring, copying = interleaved(runs, ROUNDS, "cuda")
    moved = REPEATS * pixels.numel() / 1e9
    return {
        "images": len(pixels),
        "side": pixels.shape[-1],
        "patch_size": patch_size,
        "scales": scales,
        "gb_per_s_scoring": moved / statistics.median(scoring),
        "gb_per_s_copy": moved / statistics.median(copying),
        "copy_over_scoring": vars(Spread.of_ratios(copying, scoring)),
        "ms_per_batch": 1e3 * statistics.median(scoring) / REPEATS,
        "largest_difference_bits": difference,
    }


def _repeat(run: Callable[[], Any]) -> None:
    """Many calls in a row, so that neither starting nor waiting counts."""
    for _ in range(REPEATS):
        run()


def _cuda_table(record: dict) -> str:
    lines = [
        "# Scoring on a GPU",
        "",
        f"`{record['command']}`, {record['device']}, torch {record['torch']}, {record['rounds']} interleaved rounds of "
        f"{record['repeats']} calls, crops of real photos as uint8. GB/s of the batch's bytes, each counted once: a "
        "copy reads and writes them, scoring only reads them.",
        "",
        "| batch | scales | ms per batch | scoring, GB/s | copy, GB/s | scoring is a copy's speed times | "
        "differs from the CPU by at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        ratio = row["copy_over_scoring"]
        lines.append(
            f"| {row['images']} x {row['side']} px, patch {row['patch_size']} | {row['scales']} | "
            f"{row['ms_per_batch']:.3f} | {row['gb_per_s_scoring']:.0f} | {row['gb_per_s_copy']:.0f} | "
            f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f}) | "
            f"{row['largest_difference_bits']:.4f} bits |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["cuda"]:
        measure_cuda(Path(sys.argv[2]) if len(sys.argv) > 2 else RESULTS / "gpu")
    elif sys.argv[1:2] == ["share"]:
        measure_share()
    else:
        measure_cpu()


if __name__ == "__main__":
    main()
