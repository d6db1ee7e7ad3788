"""Detectors and segmenters at 512, 1024 and 1536 pixels: time, operations and memory, uniform beside adaptive.

    python benchmarks/dense_speed.py data/photos
    python benchmarks/dense_speed.py data/photos --device cuda --dtype bfloat16 --size 1536 \\
        --model eva02_large_patch14_448 --window 32 --global-blocks 2 5 8 11 14 17 20 23 --compile --stream 4

From normalised pictures in memory to feature maps (backbone), and to boxes or classes of pixels (end to end), scoring
and patchifying included; random weights, on which the time does not depend where boxes are as many: the detector
proposes a fixed number, and the 500 surest classes of a picture's boxes are let through. Both sides run in one
process, in turn: the uniform one is the same network with nothing merged, for backbones without windows also timm's
own forward, and with ``--smaller 0.7`` the uniform network on pictures of 70 % of the pixels. Of a preview both
passes count, in the tokens too. Images are scaled so that the longer side has the size, and cut to whole windows: no
padding. Networks with windows have no class token, as EVA-02's detectors. With ``--stream 4`` each round passes the
batch four times through `aptvit.data.score_ahead`, uniform ones too: a GPU is not kept waiting between two batches.
Writes dense-speed-<device>.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

import aptvit
from aptvit.data import score_ahead
from aptvit.dense.transforms import fit
from aptvit.files.images import find_images, open_image
from aptvit.files.sample_photos import sample_photos
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.memory import peak_memory
from aptvit.measuring.operations import count_flops, countable_attention
from aptvit.measuring.record import plain
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.measuring.tables import Columns, markdown_page, markdown_table
from aptvit.patching.budget import Budget
from aptvit.patching.layout import PatchLayout
from aptvit.storage.writing import write_json
from aptvit.training.tasks.detection import DetectionLearner

RESULTS = Path(__file__).parent / "results"
CANDIDATES = 500  # classes of boxes of a picture that are sure enough to be compared with each other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path, help="scikit-image's and scikit-learn's unless some are given")
    parser.add_argument("--model", default="vit_base_patch16_384")
    parser.add_argument("--window", type=int, default=0, help="side of windows in patches; 0 for none")
    parser.add_argument("--global-blocks", type=int, nargs="*", default=[])
    parser.add_argument("--size", type=int, nargs="*", default=[512, 1024, 1536])
    parser.add_argument("--keep", type=float, nargs="*", default=[0.7, 0.5])
    parser.add_argument("--smaller", type=float, nargs="*", default=[], help="shares of the pixels: smaller pictures")
    parser.add_argument("--part", nargs="*", default=["backbone", "detector", "segmenter"])
    parser.add_argument("--scorer", default="entropy", help="or spread, fitted on the same photos, or preview")
    parser.add_argument("--area-bias", type=float, default=0.0, help="what a patch's area adds to its attention")
    parser.add_argument("--channels", type=int, default=256, help="of the pyramid and the heads")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--by", default="thresholds", choices=("thresholds", "keep"), help="keep: all photos alike")
    parser.add_argument("--stream", type=int, default=1, help="batches of a round, each scored while another is read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs of the blocks, on both sides")
    parser.add_argument("--compile", action="store_true", help="compiled blocks, neck and heads, on both sides")
    parser.add_argument("--memory", action="store_true", help="also the peak of the backbone's tensors")
    parser.add_argument("--name", default="dense-speed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.graphs and (options.compile or torch.device(options.device).type != "cuda"):
        parser.error("--graphs needs --device cuda, and no --compile")
    environment = prepare_machine(options.device)
    rows = []
    for size in options.size:
        for part in options.part:
            rows += measure(options, part, size)
            print(json.dumps(rows[-1]), flush=True)
    words = [f"--{name.replace('_', '-')} {_word(value)}" for name, value in vars(options).items() if name in _TOLD]
    words += [f"--name {options.name}"] if options.name != "dense-speed" else []
    words += [f"--{name}" for name in ("graphs", "compile", "memory") if getattr(options, name)]
    record = {
        "command": f"python benchmarks/dense_speed.py {' '.join(map(str, options.photos))} {' '.join(words)}",
        "environment": environment,
        **{name: getattr(options, name) for name in _KEYS},
        "launches": "one graph" if options.graphs else "compiled" if options.compile else "one by one",
        "rows": rows,
    }
    name = f"{options.name}-{torch.device(options.device).type}"
    write_json(options.out / f"{name}.json", record, indent=1)
    (options.out / f"{name}.md").write_text(as_markdown(record), encoding="utf-8")
    print(as_markdown(record))


_TOLD = (
    *("model", "window", "global_blocks", "size", "keep", "smaller", "part", "scorer", "by", "channels", "batch"),
    *("stream", "area_bias", "rounds", "device", "dtype"),
)


_KEYS = ("model", "window", "batch", "channels", "scorer", "dtype", "by", "stream", "area_bias")


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def measure(options: argparse.Namespace, part: str, size: int) -> list[dict[str, Any]]:
    """Rows of one part at one size: nothing merged, then each share."""
    device, dtype = options.device, getattr(torch, options.dtype)
    torch.manual_seed(0)
    windows: dict[str, Any] = {}
    if options.window:
        windows = {"window_size": options.window, "global_blocks": options.global_blocks}
    host: dict[str, Any] = {"class_token": False, "global_pool": "avg"} if options.window else {}
    vit = timm.create_model(options.model, img_size=size, patch_size=16, num_classes=0, dynamic_img_size=True, **host)
    reads_twice = options.scorer == "preview"
    scales = 2 if reads_twice else 3
    model = aptvit.adapt(vit, scales=scales, scorer=options.scorer, area_bias=options.area_bias, **windows)
    stride = model.patch_size * (options.window or 4)
    images = read(options.photos, size, stride, options.batch, model).to(device, dtype)
    network, run = build(model, part, options.channels, device, dtype, images)
    if options.scorer == "spread":  # what it foresees decides which patches are merged, not how long that takes
        last = partial(model.forward_intermediates, indices=1, intermediates_only=True)
        aptvit.fit_spread(model, images, lambda pictures: last(pictures)[0].float(), updates=20)
    chosen: list[Callable[[], Any]] = []
    kept = []
    for keep in (1.0, *options.keep):
        share = (12 * keep + 1) / 16 if reads_twice and keep < 1 else keep  # a first pass counts
        if keep == 1:
            model.thresholds = (-1.0,) * (scales - 1)
        elif options.by == "keep":
            model.keep = share
        else:
            model.thresholds = aptvit.calibrate(model, images, keep=share)
        kept.append(model.layout(images).read_ratio)
        chosen.append(partial(_with, model, model.budget, run, [images] * options.stream))
    names = ["nothing merged", *(f"keep {keep:g}" for keep in options.keep)]
    for share in options.smaller:
        small = shrink(images, share, model.patch_size * (options.window or 1))
        model.thresholds = (-1.0,) * (scales - 1)
        chosen.append(partial(_with, model, model.budget, run, [small] * options.stream))
        kept.append(small[0, 0].numel() / images[0, 0].numel())
        names.append(f"smaller pictures, {share:g}")
    if part == "backbone" and not (options.window or options.graphs or options.compile):
        vit = vit.to(device, dtype).eval()
        its = partial(vit.forward_intermediates, images, indices=1, intermediates_only=True)
        chosen.append(lambda: [its() for _ in range(options.stream)])
        names, kept = [*names, "timm"], [*kept, 1.0]
    with torch.inference_mode():
        interleaved(chosen, 1, device)  # composes the weights of big patches, which is done once
        with countable_attention(model, device):
            flops = [count_flops(one) for one in chosen]
        if options.graphs or options.compile:
            model.use_cuda_graphs() if options.graphs else network.compile()
            interleaved(chosen, 1, device)  # records, compiles
        seconds = interleaved(chosen, options.rounds, device)
        memory = [peak_memory(one, device) for one in chosen] if options.memory else [0] * len(chosen)
    speedups = [Ratio.of_rounds(seconds[0], times) for times in seconds]
    return [
        {
            "size": f"{images.shape[3]}x{images.shape[2]}",
            "part": part,
            "method": names[i],
            "kept": kept[i],
            "images_per_second": options.stream * len(images) / statistics.median(seconds[i]),
            "speedup": plain(speedups[i]),
            "flop_ratio": flops[0] / flops[i],
            "eta": speedups[i].median / (flops[0] / flops[i]),
            "gigabytes": memory[i] / 2**30,
        }
        for i in range(len(chosen))
    ]


def _with(model: Any, budget: Budget, run: Callable[[Tensor, PatchLayout], Any], batches: list[Tensor]) -> None:
    model.budget = budget
    for images, layout in score_ahead(model, batches):
        run(images, layout)


def read(photos: list[Path], size: int, stride: int, count: int, model: Any) -> Tensor:
    """(count, 3, H, W): landscape photos, the longer side ``size`` pixels, cut to three quarters of it."""
    height = max(size * 3 // 4 // stride * stride, stride)
    pictures = []
    opened = map(open_image, find_images(photos)) if photos else map(Image.fromarray, sample_photos().values())
    for image in map(pil_to_tensor, opened):
        if image.shape[2] < image.shape[1]:
            image = image.transpose(1, 2)
        image = fit(image, size)
        if image.shape[1] >= height:
            pictures.append(image[:, :height])
    mean, std = (torch.tensor(one).view(-1, 1, 1) for one in (model.patchifier.mean, model.patchifier.std))
    if len(pictures) < count:
        raise SystemExit(f"{len(pictures)} photos have {height} rows at {size} pixels, {count} are wanted: give more")
    spread = pictures[:: max(1, len(pictures) // count)][:count]
    return torch.stack([(one.float() / 255 - mean) / std for one in spread])


def shrink(images: Tensor, share: float, stride: int) -> Tensor:
    """Pictures of about this share of the pixels, in whole patches or windows."""
    height, width = (max(stride, round(side * share**0.5 / stride) * stride) for side in images.shape[2:])
    return F.interpolate(images.float(), (height, width), mode="bilinear", antialias=True).to(images.dtype)


def build(
    model: Any, part: str, channels: int, device: str, dtype: torch.dtype, images: Tensor
) -> tuple[Any, Callable[[Tensor, PatchLayout], Any]]:
    """The network, and what is timed of it."""
    if part == "backbone":
        model.to(device, dtype).eval()
        last = partial(model.forward_intermediates, indices=1, intermediates_only=True)
        return model, lambda images, layout: last(images, layout=layout)
    if part == "segmenter":
        segmenter: Any = aptvit.dense.make_segmenter(model, 150, channels=channels, auxiliary_channels=0)
        segmenter.to(device, dtype).eval()
        return segmenter, segmenter
    detector: Any = aptvit.dense.make_detector(model, 80, out_channels=channels)
    # Boxes are computed in single precision: a detector runs under autocast, as it is trained and evaluated.
    learner = DetectionLearner(detector.to(device).eval())

    def run(images: Tensor, layout: PatchLayout) -> Any:
        from torchvision.models.detection.image_list import ImageList

        images = images.float()
        sizes = [(images.shape[2], images.shape[3])] * len(images)
        with torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32):
            return learner(ImageList(images, sizes), None, layout)

    sure_enough(detector, partial(run, images, model.layout(images)))
    return detector, run


@torch.inference_mode()
def sure_enough(detector: Any, run: Callable[[], list[Any]]) -> None:
    """Set the score that a box needs so that `CANDIDATES` of a picture have it; of random weights all would."""
    logits: list[Tensor] = []
    predictor = detector.roi_heads.box_predictor
    hook = predictor.register_forward_hook(lambda _module, _inputs, out: logits.append(out[0]))
    detector.roi_heads.score_thresh = 1.0
    num_images = len(run())
    hook.remove()
    scores = logits[0].float().softmax(-1)[:, 1:].flatten()
    detector.roi_heads.score_thresh = float(scores.topk(CANDIDATES * num_images).values[-1])


def as_markdown(record: dict[str, Any]) -> str:
    windows = f", windows of {record['window']} patches" if record["window"] else ""
    about = (
        f"{record['model']}{windows}, {record['dtype']}, random weights, {record['batch']} photo(s) at a time, heads "
        f"of {record['channels']} channels, scored by {record['scorer']}, chosen by {record.get('by', 'thresholds')}; "
        f"blocks launched {record.get('launches', 'one by one')}, {record.get('stream', 1)} batch(es) in a row"
        + (f"; area bias {record['area_bias']:g}." if record.get("area_bias") else ".")
    )
    columns: Columns = (
        ("size", lambda row: row["size"]),
        ("part", lambda row: row["part"]),
        ("patches", lambda row: row["method"]),
        ("tokens", lambda row: f"{row['kept']:.0%}"),
        ("images/s", lambda row: f"{row['images_per_second']:.3f}"),
        ("speed-up (rounds)", lambda row: f"{Ratio(**row['speedup']):.2f}"),
        ("FLOP ratio", lambda row: f"{row['flop_ratio']:.2f}"),
        ("eta", lambda row: f"{row['eta']:.2f}"),
        ("memory", lambda row: f"{row['gigabytes']:.2f} GiB" if row["gigabytes"] else "not measured"),
    )
    table = markdown_table(columns, record["rows"])
    return markdown_page("Dense tasks: speed", [record["command"]], record["environment"], about, table)


if __name__ == "__main__":
    main()
