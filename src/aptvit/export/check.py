"""A graph beside the model that it was made of, on images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import aptvit
from aptvit.api import load_saved
from aptvit.export.graphs import export_onnx, export_torch
from aptvit.files.images import find_images, open_image
from aptvit.files.sample_photos import sample_photos
from aptvit.hosts.pretrained import evaluation_transform, load_host

__all__ = ["GraphCheck", "Wanted", "export_and_check"]

_MOST = 256  # photos that are compared


@dataclass(frozen=True)
class Wanted:
    """The model to export.

    Attributes:
        model: timm's name, or a folder that ``save_pretrained`` or a training wrote.
        checkpoint: Weights of a timm model.
        img_size: Side of its input.
        keep: Share of the tokens; thresholds are found on the photos.
        thresholds: Thresholds instead of a share.
        scorer: As for `aptvit.adapt`.
        scales: Patch sizes, where a share is asked for.
    """

    model: str
    checkpoint: Path | None = None
    img_size: int | None = None
    keep: float | None = None
    thresholds: tuple[float, ...] | None = None
    scorer: str = "entropy"
    scales: int = 2


@dataclass(frozen=True)
class GraphCheck:
    """How a graph compares with the model.

    Attributes:
        files: The graph, or the two.
        megabytes: Their size.
        photos: Number of images that were compared.
        agreement: Share of the images with the same best class.
        largest_error: Largest difference of a logit, of images that were cut alike.
        same_patches: Share of the images that were cut alike.
        tokens: Mean share of the patch tokens.
    """

    files: str
    megabytes: float
    photos: int
    agreement: float
    largest_error: float
    same_patches: float
    tokens: float


def export_and_check(
    wanted: Wanted, photos: Sequence[Path], format: Literal["onnx", "torch-export"], apart: bool, int8: bool, out: Path
) -> list[GraphCheck]:
    """Write graphs and run them beside the model.

    Args:
        wanted: The model.
        photos: Files and folders; by default the photos that scikit-image and scikit-learn install.
        format: Of the graph.
        apart: Two graphs.
        int8: Also one with 8-bit weights.
        out: Folder.

    Returns:
        A comparison for each graph, the exact one first.

    Raises:
        ValueError: If this model has no graph.
        ImportError: If what exports or runs graphs is not installed.
    """
    model, data = _load(wanted)
    images = _read(photos, data)
    share = wanted.keep if wanted.keep is not None else model.keep
    if wanted.thresholds is not None:
        model.thresholds = wanted.thresholds
    elif share is not None:
        aptvit.calibrate(model, list(images), keep=share)
    size = (images.shape[2], images.shape[3])
    if format == "torch-export":
        exported = export_torch(model, size, out)
        program: Any = torch.export.load(out / exported.files[0]).module()
        return [_compare(model, images, lambda image: [part.numpy() for part in program(image)], exported.files, out)]
    graphs = [export_onnx(model, size, out, apart).files]
    if int8:
        graphs.append(tuple(_quantised(out / name).name for name in graphs[0]))
    return [_compare(model, images, _session(out, files), files, out) for files in graphs]


def _load(wanted: Wanted) -> tuple[Any, dict[str, Any]]:
    saved = load_saved(wanted.model)
    if saved is not None:
        return saved
    host = load_host(wanted.model, wanted.checkpoint, wanted.img_size)
    share = {"scales": wanted.scales, "keep": 0.5 if wanted.keep is None else wanted.keep}
    budget = share if wanted.thresholds is None else {"thresholds": wanted.thresholds}
    return aptvit.adapt(host.model, scorer=wanted.scorer, **budget), host.data


def _read(photos: Sequence[Path], data: dict[str, Any]) -> Tensor:
    """(n, C, H, W) uint8 as the model's evaluation transform gives them."""
    files = find_images(photos) if photos else []
    opened = [open_image(file) for file in files[:: -(-len(files) // _MOST) or 1]]
    transform = evaluation_transform(data)
    images = opened or [Image.fromarray(pixels) for pixels in sample_photos().values()]
    return torch.stack([torch.as_tensor(np.asarray(transform(image))) for image in images])


@torch.inference_mode()
def _compare(
    model: Any, images: Tensor, run: Callable[[Tensor], Sequence[np.ndarray]], files: Sequence[str], out: Path
) -> GraphCheck:
    same, alike, errors, kept = [], [], [0.0], []
    for image in images.split(1):
        logits, scales = run(image)
        layout = model.layout(image)
        expected = model(image, layout=layout).float().numpy()
        kept.append(layout.keep_ratio)
        same.append(logits.argmax() == expected.argmax())
        alike.append(bool((scales == layout.scale_map[0].numpy()).all()))
        if alike[-1]:
            errors.append(float(np.abs(logits - expected).max()))
    return GraphCheck(
        files=" + ".join(files),
        megabytes=sum(file.stat().st_size for name in files for file in out.glob(f"{name}*")) / 1e6,
        photos=len(images),
        agreement=float(np.mean(same)),
        largest_error=max(errors),
        same_patches=float(np.mean(alike)),
        tokens=float(np.mean(kept)),
    )


def _session(out: Path, files: Sequence[str]) -> Callable[[Tensor], Sequence[np.ndarray]]:
    """Runs one graph, or the two, on an image (1, C, H, W) -> logits (1, classes), scales (h, w)."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError("checking a graph needs onnxruntime: pip install 'aptvit[export]'") from None
    sessions = [onnxruntime.InferenceSession(out / name, providers=["CPUExecutionProvider"]) for name in files]

    def run(image: Tensor) -> Sequence[np.ndarray]:
        outputs = sessions[0].run(None, {"image": image.numpy()})
        if len(sessions) == 2:
            (scales,) = outputs
            outputs = [*sessions[1].run(None, {"image": image.numpy(), "scales": scales}), scales]
        return outputs

    return run


def _quantised(file: Path) -> Path:
    """The same graph with weights of matrix products in 8 bits."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph, small = onnx.load(file), file.with_name(f"{file.stem}.int8.onnx")
    del graph.graph.value_info[:]  # shapes of the weights as they were before the exporter transposed them
    quantize_dynamic(graph, small, weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True})
    return small
