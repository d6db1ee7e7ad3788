"""Which scorer and which way of saving are best without fitting: the defaults of ``aptvit.adapt(vit, keep=...)``.

    OMP_NUM_THREADS=1 python benchmarks/defaults.py      # about an hour; an interrupted run goes on

DATA holds vit_tiny/ (a checkpoint of vit_tiny_patch16_224) with imagenet_sample/ (images and labels.csv), on which
methods may be chosen, and vit_small_focus/ (a trained saliency network) with coco_val64/. Nothing is trained. Writes
benchmarks/results/defaults.{json,md}.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import aptvit
from aptvit.calibration.calibrator import calibrate
from aptvit.evaluation.statistics import Interval, agrees, bootstrap_mean, is_correct
from aptvit.files.batches import NormalisedBatches, read_images
from aptvit.files.images import find_images
from aptvit.hosts.pretrained import load_host
from aptvit.hosts.saliency import ARCHITECTURE, SaliencyDecoder, SaliencyNet
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.plots import write_results
from aptvit.measuring.record import Measurement, Record
from aptvit.measuring.tables import Columns, markdown_page, percent, section

DATA = Path(os.environ.get("APTVIT_DATA", Path(__file__).parents[1] / "data"))
RESULTS = Path(__file__).parent / "results"
CLASSIFIER = "vit_tiny_patch16_224"
NETWORKS = (CLASSIFIER, ARCHITECTURE)
SALIENCY_SIZE = 392  # of the saliency network's images: an even number of its patches of 14 pixels
SCORERS = ("entropy", "embedding", "laplacian", "upsample")
SAVINGS: dict[str, dict[str, Any]] = {"every image": {}, "blend": {"blend": 0.5}, "thresholds": {}}
SHARES = (0.67, 0.5)


@dataclass(frozen=True)
class Outputs:
    """What a network makes of all images.

    Attributes:
        fidelity: (N,) whether the class is the uniform model's, or the correlation with the uniform model's map.
        correct: (N,) whether the class is right; None without labels.
        kept: Mean share of the patch tokens.
    """

    fidelity: np.ndarray
    correct: np.ndarray | None
    kept: float


@dataclass(frozen=True)
class DefaultRow(Measurement):
    """A scorer and a way of saving, for one network and share.

    Attributes:
        network: Name of the timm model.
        keep: Share of the patch tokens, of every image or on average.
        saving: One of `SAVINGS`.
        scorer: Name of the scorer.
        kept: Mean share of the patch tokens that was kept.
        fidelity: Mean of `Outputs.fidelity`.
        gain: Mean difference of the fidelity from that of entropy with every image at the share, paired by image.
        top1: Share of right classes; None without labels.
    """

    identity: ClassVar[tuple[str, ...]] = ("network", "keep", "saving", "scorer")

    network: str
    keep: float
    saving: str
    scorer: str
    kept: float | None = None
    fidelity: float | None = None
    gain: Interval | None = None
    top1: float | None = None


class DefaultRecord(Record[DefaultRow]):
    row_type = DefaultRow
    contents = "a comparison of defaults"


class Trial:
    """A network, its images, and what its uniform form makes of them.

    Args:
        name: One of `NETWORKS`.
        data: The folder of the data.
        max_images: Most images.
    """

    def __init__(self, name: str, data: Path, max_images: int) -> None:
        self.labels: Tensor | None = None
        self.network: Callable[[Any], Any]
        if name == CLASSIFIER:
            host = load_host(name, data / "vit_tiny" / f"{name}.safetensors")
            self.host, config, folder = host.model, host.data, data / "imagenet_sample"
            self.network = lambda backbone: backbone
        else:
            self.host, self.network = _saliency_network(data / "vit_small_focus" / "vit_small_focus.safetensors")
            size = (3, SALIENCY_SIZE, SALIENCY_SIZE)
            config = {**timm.data.resolve_model_data_config(self.host), "input_size": size, "crop_pct": 1.0}
            folder = data / "coco_val64" / "images"
        loaded = read_images(find_images([folder])[:max_images], config)
        self.batches = NormalisedBatches(loaded.pixels, config, 16, "cpu")
        if (folder / "labels.csv").is_file():
            with (folder / "labels.csv").open(newline="") as lines:
                classes = {row["file"]: int(row["class_index"]) for row in csv.DictReader(lines)}
            self.labels = torch.tensor([classes[path.name] for path in loaded.paths])
        self.host.eval().requires_grad_(False)
        self.uniform = self._run(self.network(self.host))

    def adapted(self, keep: float, saving: str, scorer: str) -> Outputs:
        """The outputs of the adaptive network, calibrated on all images where that is the way of saving."""
        share = {"keep": keep} if saving == "every image" else {}
        model = aptvit.adapt(self.host, scorer=scorer, scales=2, **share, **SAVINGS[saving]).eval()
        if saving != "every image":
            calibrate(model, self.batches, keep=keep)
        tokens = [n for images in self.batches for n in model.layout(images).seqlens]
        outputs = self._run(self.network(model))
        patches = np.mean(tokens) - model.num_prefix_tokens
        num_patches = np.prod(self.host.patch_embed.grid_size)
        if self.labels is None:
            fidelity = torch.nn.functional.cosine_similarity(*map(_centred, (outputs, self.uniform)))
        else:
            fidelity = agrees(outputs, self.uniform)
        correct = None if self.labels is None else is_correct(outputs, self.labels).double().numpy()
        return Outputs(fidelity.double().numpy(), correct, float(patches / num_patches))

    @cache  # noqa: B019 - two trials, as long as the process
    def baseline(self, keep: float) -> Outputs:
        """Entropy, with every image at the share."""
        return self.adapted(keep, "every image", "entropy")

    @torch.inference_mode()
    def _run(self, network: Any) -> Tensor:
        return torch.cat([network(images) for images in self.batches])


def _centred(maps: Tensor) -> Tensor:
    """(N, H, W) -> (N, H W), each row less its mean: the cosine of two such rows is Pearson's correlation."""
    return maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True)


def _saliency_network(weights: Path) -> tuple[Any, Callable[[Any], Any]]:
    """The backbone of the saliency network, and what puts a backbone into that network."""
    network = SaliencyNet(timm.create_model(ARCHITECTURE, num_classes=0), SaliencyDecoder())
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    network.backbone.set_input_size(SALIENCY_SIZE)
    return network.backbone, partial(SaliencyNet, decoder=network.decoder.eval())


def measure(trial: Callable[[str], Trial], row: DefaultRow) -> dict[str, Any]:
    """The other fields of a row."""
    baseline = trial(row.network).baseline(row.keep)
    outputs = trial(row.network).adapted(row.keep, row.saving, row.scorer)
    return {
        "kept": outputs.kept,
        "fidelity": float(outputs.fidelity.mean()),
        "gain": bootstrap_mean(outputs.fidelity - baseline.fidelity),
        "top1": None if outputs.correct is None else float(outputs.correct.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--max-images", type=int, default=500, help="most images of each network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds already")
    options = parser.parse_args()
    if not all((options.data / name).is_dir() for name in ("vit_tiny", "vit_small_focus")):
        print(f"skipped: no checkpoints in {options.data} (--data or APTVIT_DATA names another folder)")
        return
    environment = {**prepare_machine("cpu"), "most images": str(options.max_images)}
    path = options.out / "defaults.json"
    command = shlex.join(["python", "benchmarks/defaults.py", *sys.argv[1:]])
    record = DefaultRecord.resume(path, environment, command, options.fresh)
    trial = cache(partial(Trial, data=options.data, max_images=options.max_images))
    rows = [
        DefaultRow(network, keep, saving, scorer)
        for network in NETWORKS
        for keep in SHARES
        for saving in SAVINGS
        for scorer in SCORERS
    ]
    record.measure(rows, partial(measure, trial), path, done=print)
    write_results(record, options.out, "defaults", as_markdown, lambda record: {})


def as_markdown(record: DefaultRecord, drawn: list[str]) -> str:
    texts = {
        CLASSIFIER: "Images of imagenet_sample at 224 pixels. Fidelity is the share of images with the uniform model's "
        "class.",
        ARCHITECTURE: f"The saliency network on coco_val64 at {SALIENCY_SIZE} pixels. Fidelity is the mean correlation "
        "with the uniform network's map.",
    }
    columns: Columns = (
        ("share", lambda row: f"{row.keep:g}"),
        ("saving", lambda row: row.saving),
        ("scorer", lambda row: row.scorer),
        ("kept", lambda row: percent(row.kept)),
        ("fidelity", lambda row: percent(row.fidelity)),
        (
            "gain over entropy, every image (95 %)",
            lambda row: f"{100 * row.gain.mean:+.1f} ({100 * row.gain.low:+.1f} to {100 * row.gain.high:+.1f})",
        ),
        ("top-1", lambda row: None if row.top1 is None else percent(row.top1)),
    )
    about = (
        "float32, two patch sizes, no training. *every image*: each keeps the share (`keep=`). *thresholds*: one "
        "threshold, calibrated on these images to the share on average. *blend*: the middle of both (`blend=0.5`). "
        "Gains are paired by image, in points."
    )
    sections = [
        section(name, text, columns, [row for row in record.measured if row.network == name])
        for name, text in texts.items()
    ]
    return markdown_page(
        "Scorers and ways of saving without fitting", record.commands, record.environment, about, *sections
    )


if __name__ == "__main__":
    main()
