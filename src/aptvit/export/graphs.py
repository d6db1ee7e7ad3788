"""Export of a model as a graph from the pixels of an image to logits; the number of tokens depends on the image.

The batch size is one, so nothing is packed: for each scale the graph finds the selected patches (`nonzero`), takes
their pixels and embeds them with the affine map of that scale; then the host's blocks run on all tokens. The order of
tokens does not matter to attention: prefix tokens come first, then the patches scale by scale.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from aptvit.hosts.pretrained import class_names
from aptvit.hosts.timm import TimmAdapter
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.entropy import EntropyScorer
from aptvit.patching.kernels.entropy_torch import entropy_maps_scattered
from aptvit.patching.selection import is_limited, scales_from_thresholds
from aptvit.storage.writing import WriteError, replacing, write_bytes, write_json

__all__ = ["Exported", "Reader", "ScaleSelector", "WholePath", "export_onnx", "export_torch"]


class ScaleSelector(nn.Module):
    """Selects patches: from the pixels of an image to the scale of each cell of the base grid.

    Args:
        model: The adaptive model, with thresholds.
        size: (height, width) of the images in pixels.

    Raises:
        ValueError: If patches are not selected by thresholds alone, or the graph cannot represent the scorer, windows,
            ``area_bias`` or ``reading``.
    """

    def __init__(self, model: AdaptivePatchTransformer, size: tuple[int, int]) -> None:
        super().__init__()
        patchifier = model.patchifier
        if patchifier.budget.thresholds is None or patchifier.budget.keep is not None or is_limited(patchifier.budget):
            raise ValueError(
                "a graph selects patches by thresholds alone: find them with aptvit.calibrate(model, images, keep)"
            )
        if model.window_size is not None:
            raise ValueError("windows have no graph yet: export a model without window_size")
        if model.area_bias:
            raise ValueError(f"area_bias={model.area_bias} has no graph yet: export a model without it")
        if model.reading != "resized":
            raise ValueError(f"reading={model.reading!r} has no graph yet: export a model without it")
        if patchifier.scorer_name not in ("entropy", "laplacian", "upsample"):
            raise ValueError(f"scorer={patchifier.scorer_name!r} has no graph: use entropy, laplacian or upsample")
        self.patch_size, self.thresholds = patchifier.patch_size, patchifier.budget.thresholds
        self.grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        self.scorer: Any = patchifier.scorer
        if isinstance(self.scorer, EntropyScorer):
            self.scorer = EntropyScorer(self.scorer.bins, kernel=entropy_maps_scattered)

    def forward(self, image: Tensor) -> Tensor:
        """Score the patches of an image and select them.

        Args:
            image: (1, C, H, W) pixels from 0 to 255.

        Returns:
            (h, w) int8, the scale of the patch that covers each base cell; 0 is the base size.
        """
        factors = [2**i for i in range(1, len(self.thresholds) + 1)]
        scores = self.scorer(image.float(), self.patch_size, factors)
        return scales_from_thresholds(scores, self.thresholds, self.grid, 1)[0]


class Reader(nn.Module):
    """Embeds and classifies: from the pixels of an image and the scale of each base cell to logits.

    Args:
        model: The adaptive model.
        size: (height, width) of the images in pixels.

    Raises:
        ValueError: If the host is not a timm model.
    """

    mean: Tensor
    std: Tensor
    prefix: Tensor

    def __init__(self, model: AdaptivePatchTransformer, size: tuple[int, int]) -> None:
        super().__init__()
        adapter, encoder = model.adapter, model.packed_encoder
        if not isinstance(adapter, TimmAdapter):
            raise ValueError(f"{type(adapter.vit).__name__} has no graph yet: export a timm model")
        self.vit, self.patch_size = adapter.vit, model.patch_size
        self.block_arguments, self.before_blocks, self.norm = (
            adapter.block_arguments,
            adapter.before_blocks,
            adapter.norm,
        )
        self.patch_norm = adapter.patch_norm
        self.grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        self.num_scales = model.num_scales
        with torch.no_grad():
            derived = encoder.derived.fresh(encoder.derived.check(), waited=False)
            maps = [derived.maps.of_scale(scale) for scale in range(self.num_scales)]
            tables = encoder.positions_of_scales(self.grid, self.num_scales)
            mean, std = model.patchifier.normalization.statistics(torch.device("cpu"))
            self._register("mean", mean * 255)
            self._register("std", std * 255)
            self._register("prefix", adapter.prefix_tokens())
            for scale, ((weight, bias), (absolute, rotary)) in enumerate(zip(maps, tables, strict=True)):
                for name, value in (("weight", weight), ("bias", bias), ("absolute", absolute), ("rotary", rotary)):
                    self._register(f"{name}{scale}", value)

    def _register(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, None if value is None else value.detach().clone())

    def _buffer(self, name: str, scale: int) -> Any:
        return getattr(self, f"{name}{scale}")

    def forward(self, image: Tensor, scale_map: Tensor) -> Tensor:
        """Compute logits.

        Args:
            image: (1, C, H, W) pixels from 0 to 255.
            scale_map: (h, w) scales, see `ScaleSelector`.

        Returns:
            (1, classes) logits.
        """
        x = (image.float() - self.mean) / self.std
        rows: list[Tensor] = [self.prefix]
        rotations: list[Tensor] = []
        for scale in range(self.num_scales):
            height, width = (side >> scale for side in self.grid)
            if not height * width:
                continue
            corner = scale_map[: height << scale : 1 << scale, : width << scale : 1 << scale]
            cell = (corner == scale).flatten().nonzero()[:, 0]
            side = self.patch_size << scale
            whole = x[0, :, : height * side, : width * side]
            # (C, h s, w s) -> (h w, C s s)
            cells = whole.unflatten(2, (width, side)).unflatten(1, (height, side)).permute(1, 3, 0, 2, 4)
            pixels = cells.flatten(2).flatten(0, 1).index_select(0, cell)
            row = self.patch_norm(
                nn.functional.linear(pixels, self._buffer("weight", scale), self._buffer("bias", scale))
            )
            absolute, rotary = self._buffer("absolute", scale), self._buffer("rotary", scale)
            rows.append(row if absolute is None else row + absolute.index_select(0, cell))
            if rotary is not None:
                rotations.append(rotary.index_select(-2, cell))
        x = self.before_blocks(torch.cat(rows)[None])
        for block, arguments in zip(self.vit.blocks, self.block_arguments(self._rotation(rotations)), strict=True):
            x = block(x, **arguments)
        logits: Tensor = self.vit.forward_head(self.norm(x))
        return logits

    def _rotation(self, rotations: Sequence[Tensor]) -> Tensor | None:
        """Rotary embedding of all tokens of the batch in the form that blocks take; prefix tokens are not rotated."""
        if not rotations:
            return None
        width = rotations[0].shape[-1]
        identity = rotations[0].new_zeros(*rotations[0].shape[:-2], len(self.prefix), width)
        identity = torch.cat([identity[..., : width // 2], identity[..., width // 2 :] + 1], dim=-1)
        joined = torch.cat([identity, *rotations], dim=-2)
        return joined[None, None] if joined.ndim == 2 else joined[:, None]


class WholePath(nn.Module):
    """The whole graph: from the pixels of an image to logits and the scale of each base cell.

    Args:
        model: The adaptive model, with thresholds; in eval mode, float32, on the CPU.
        size: (height, width) of the images in pixels, multiples of the patch size.

    Raises:
        ValueError: If the size is not a multiple of the patch size, or the model has no graph (see `ScaleSelector` and
            `Reader`).
    """

    def __init__(self, model: AdaptivePatchTransformer, size: tuple[int, int]) -> None:
        super().__init__()
        if any(side % model.patch_size for side in size):
            raise ValueError(f"images of {size[1]}x{size[0]} pixels are not whole patches of {model.patch_size}")
        self.choose, self.read = ScaleSelector(model, size), Reader(model, size)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Select patches and compute logits.

        Args:
            image: (1, C, H, W) pixels from 0 to 255.

        Returns:
            (1, classes) logits, and (h, w) int8 scales.
        """
        scale_map = self.choose(image)
        return self.read(image, scale_map), scale_map


@dataclass(frozen=True)
class Exported:
    """Description of exported graphs, which ``export.json`` holds too.

    Attributes:
        files: Names of the files with the graphs.
        size: (height, width) of the images in pixels.
        thresholds: Thresholds that select patches, from fine to coarse.
        patch_size: Side of a base patch in pixels.
        classes: A name for each logit, in order; None if the model has no names.
    """

    files: tuple[str, ...]
    size: tuple[int, int]
    thresholds: tuple[float, ...]
    patch_size: int
    classes: tuple[str, ...] | None = None


def export_onnx(model: AdaptivePatchTransformer, size: tuple[int, int], out: Path, in_parts: bool = False) -> Exported:
    """Write a model as ONNX graphs, and their description to ``export.json``.

    Args:
        model: The adaptive model, with thresholds; it is set to eval mode.
        size: (height, width) of the images in pixels.
        out: Folder to write to.
        in_parts: Write two graphs, ``choose.onnx`` (image to scales) and ``read.onnx`` (image and scales to logits), in
            place of ``model.onnx``.

    Returns:
        The description of the graphs.

    Raises:
        ImportError: If onnx or onnxscript is not installed.
        ValueError: If the model has no graph, see `WholePath`.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError("ONNX needs onnx and onnxscript: pip install 'aptvit[export]'") from None
    path = WholePath(model.eval(), size).eval()
    out.mkdir(parents=True, exist_ok=True)
    image = torch.zeros(1, model.adapter.in_chans, *size, dtype=torch.uint8)
    scales = torch.zeros(path.choose.grid, dtype=torch.int8)
    scales[:2, :2] = min(1, model.num_scales - 1)
    graphs: list[tuple[str, nn.Module, tuple[Tensor, ...], list[str], list[str]]]
    if in_parts:
        graphs = [
            ("choose.onnx", path.choose, (image,), ["image"], ["scales"]),
            ("read.onnx", path.read, (image, scales), ["image", "scales"], ["logits"]),
        ]
    else:
        graphs = [("model.onnx", path, (image,), ["image"], ["logits", "scales"])]
    for name, module, inputs, input_names, output_names in graphs:
        with torch.no_grad():
            program = torch.onnx.export(
                module, inputs, dynamo=True, input_names=input_names, output_names=output_names, verbose=False
            )
        assert program is not None
        _save_graph(program, out / name)
    return _write_description(out, tuple(name for name, *_ in graphs), model, size)


def _save_graph(program: Any, path: Path) -> None:
    """Write a graph, and its weights where they are in a file beside it, which the graph names."""
    with TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        try:
            program.save(str(Path(folder) / path.name))
        except OSError as error:
            raise WriteError(path, error.strerror or str(error)) from error
        for part in sorted(Path(folder).iterdir(), reverse=True):  # weights before the graph that names them
            with replacing(path.with_name(part.name)) as draft:
                part.replace(draft)


def export_torch(model: AdaptivePatchTransformer, size: tuple[int, int], out: Path) -> Exported:
    """Write a model as ``model.pt2`` for ``torch.export.load``, and its description to ``export.json``.

    Args:
        model: The adaptive model, with thresholds; it is set to eval mode.
        size: (height, width) of the images in pixels.
        out: Folder to write to.

    Returns:
        The description of the graph.

    Raises:
        ValueError: If the model has no graph, see `WholePath`.
    """
    path = WholePath(model.eval(), size).eval()
    out.mkdir(parents=True, exist_ok=True)
    image = torch.zeros(1, model.adapter.in_chans, *size, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(path, (image,))
    # Through memory: PyTorch's own writer ends the process on a full disk.
    content = io.BytesIO()
    torch.export.save(program, content)
    write_bytes(out / "model.pt2", content.getvalue())
    return _write_description(out, ("model.pt2",), model, size)


def _write_description(
    out: Path, files: tuple[str, ...], model: AdaptivePatchTransformer, size: tuple[int, int]
) -> Exported:
    assert model.thresholds is not None
    names = class_names(model)
    exported = Exported(files, size, model.thresholds, model.patch_size, None if names is None else tuple(names))
    write_json(out / "export.json", asdict(exported))
    return exported
