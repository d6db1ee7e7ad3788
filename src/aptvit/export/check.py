"""A comparison of exported graphs with their model, on images."""

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

__all__ = ["GraphCheck", "export_and_check"]

_MAX_IMAGES = 256


@dataclass(frozen=True)
class GraphCheck:
    """The difference of a graph from its model.

    Attributes:
        files: File name of the graph, or of its two parts.
        megabytes: Size of the files in millions of bytes.
        photos: Number of images.
        agreement: Share of the images with the same top-1 class.
        largest_error: Largest difference of a logit, over images with the same patches.
        same_patches: Share of the images with the same patches.
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
    model: str,
    paths: Sequence[Path],
    out: Path,
    *,
    format: Literal["onnx", "torch-export"] = "onnx",
    in_parts: bool = False,
    int8: bool = False,
    checkpoint: Path | None = None,
    img_size: int | None = None,
    keep: float | None = None,
    thresholds: tuple[float, ...] | None = None,
    scorer: str = "entropy",
    scales: int = 2,
) -> list[GraphCheck]:
    """Export a model as graphs, and compare them with the model.

    Args:
        model: timm's name, or a folder that ``save_pretrained`` or a training wrote.
        paths: Image files and folders; if empty, the photos that scikit-image and scikit-learn install.
        out: Folder of the graphs.
        format: Format of the graphs.
        in_parts: Export two graphs: pixels to patches, and patches to logits.
        int8: Export a graph with 8-bit weights too.
        checkpoint: Weights of a timm model.
        img_size: Side of the input of a timm model in pixels.
        keep: Share of the tokens, to which thresholds are calibrated on the images; by default 0.5 for a timm model,
            and the thresholds or the share of a saved model.
        thresholds: Thresholds instead of a share.
        scorer: Scorer of a timm model, as for `aptvit.adapt`.
        scales: Number of patch sizes of a timm model with a share.

    Returns:
        A comparison for each graph, the exact graph first.

    Raises:
        ValueError: If this model has no graph.
        ImportError: If a dependency of the export is not installed.
    """
    saved = load_saved(model)
    if saved is None:
        host = load_host(model, checkpoint, img_size)
        scales = scales if thresholds is None else len(thresholds) + 1
        saved = aptvit.adapt(host.model, scorer=scorer, keep=0.5, scales=scales), host.data
    adaptive, data = saved
    images = _read(paths, data)
    share = adaptive.keep if keep is None else keep
    if thresholds is not None:
        adaptive.thresholds = thresholds
    elif share is not None:
        aptvit.calibrate(adaptive, list(images), keep=share)
    size = (images.shape[2], images.shape[3])
    if format == "torch-export":
        files = export_torch(adaptive, size, out).files
        program: Any = torch.export.load(out / files[0]).module()
        return [_compare(adaptive, images, lambda image: [part.numpy() for part in program(image)], files, out)]
    graphs = [export_onnx(adaptive, size, out, in_parts).files]
    if int8:
        graphs.append(tuple(_quantised(out / name).name for name in graphs[0]))
    return [_compare(adaptive, images, _session(out, files), files, out) for files in graphs]


def _read(paths: Sequence[Path], data: dict[str, Any]) -> Tensor:
    """(n, C, H, W) uint8 images from the evaluation transform of the model."""
    files = find_images(paths) if paths else []
    opened = [open_image(file) for file in files[:: -(-len(files) // _MAX_IMAGES) or 1]]
    images = opened or [Image.fromarray(pixels) for pixels in sample_photos().values()]
    return torch.stack([torch.as_tensor(evaluation_transform(data)(image)) for image in images])


@torch.inference_mode()
def _compare(
    model: Any, images: Tensor, run: Callable[[Tensor], Sequence[np.ndarray]], files: Sequence[str], out: Path
) -> GraphCheck:
    rows = []
    for image in images.split(1):
        logits, scales = run(image)
        layout = model.layout(image)
        expected = model(image, layout=layout).float().numpy()
        is_same = np.array_equal(scales, layout.scale_map[0].numpy())
        error = np.abs(logits - expected).max() if is_same else 0.0
        rows.append((logits.argmax() == expected.argmax(), error, is_same, layout.keep_ratio))
    agreement, error, same_patches, tokens = np.asarray(rows, dtype=np.float64).T
    return GraphCheck(
        files=" + ".join(files),
        megabytes=sum(file.stat().st_size for name in files for file in out.glob(f"{name}*")) / 1e6,
        photos=len(images),
        agreement=float(agreement.mean()),
        largest_error=float(error.max()),
        same_patches=float(same_patches.mean()),
        tokens=float(tokens.mean()),
    )


def _session(out: Path, files: Sequence[str]) -> Callable[[Tensor], Sequence[np.ndarray]]:
    """The function of a graph, or of its two parts: (1, C, H, W) image -> (1, classes) logits, (h, w) scales."""
    import onnxruntime

    sessions = [onnxruntime.InferenceSession(out / name, providers=["CPUExecutionProvider"]) for name in files]

    def run(image: Tensor) -> Sequence[np.ndarray]:
        inputs = {"image": image.numpy()}
        outputs: list[np.ndarray] = sessions[0].run(None, inputs)
        if len(sessions) == 1:
            return outputs
        return [*sessions[1].run(None, {**inputs, "scales": outputs[0]}), *outputs]

    return run


def _quantised(file: Path) -> Path:
    """Write a graph with 8-bit weights of matrix products, and return its file."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph, small = onnx.load(file), file.with_name(f"{file.stem}.int8.onnx")
    del graph.graph.value_info[:]  # shapes of weights from before the exporter transposed them
    quantize_dynamic(graph, small, weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True})
    return small
