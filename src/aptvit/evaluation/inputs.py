"""Images of an evaluation as a host reads them, and the outputs of methods on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from aptvit.datasets.labelled import LabelledImages
from aptvit.evaluation.methods import UNIFORM, Conditions, Prepared, Setup, prepare
from aptvit.files.batches import LoadedImages, NormalisedBatches, read_images
from aptvit.hosts.pretrained import Host
from aptvit.measuring.progress import Progress

__all__ = ["HostInputs"]


class HostInputs(Setup):
    """A host at one size, its images at this size and smaller ones, and its outputs.

    Args:
        host: The uniform model.
        files: The images.
        conditions: Conditions of all methods.
        progress: Wraps long work.

    Attributes:
        uniform: The uniform model, ready to run.
    """

    def __init__(self, host: Host, files: LabelledImages, conditions: Conditions, progress: Progress) -> None:
        host.model.to(conditions.device, conditions.dtype).requires_grad_(False)
        super().__init__(host, conditions, self._samples)
        self.files, self.progress, self.uniform = files, progress, prepare(UNIFORM, self)
        self.read = lru_cache(maxsize=3)(self._read)  # the size of the host, and smaller ones

    def _read(self, side: int) -> LoadedImages:
        return read_images(self.files.paths, self.host.data, self.progress, side)

    def _samples(self) -> NormalisedBatches:
        files = self.conditions.calibration
        images = self.read(self.size) if files is None else read_images(files, self.host.data, self.progress)
        return self._batches(images.pixels)

    def _batches(self, pixels: Sequence[Tensor]) -> NormalisedBatches:
        return NormalisedBatches(pixels, self.host.data, self.conditions.batch_size, self.conditions.device)

    def labels(self) -> Tensor | None:
        """(N,) class indices of the images that could be read; None without labels."""
        if self.files.labels is None:
            return None
        label_of = dict(zip(self.files.paths, self.files.labels, strict=True))
        return torch.tensor([label_of[path] for path in self.read(self.size).paths])

    def timed_batches(self, side: int) -> list[Tensor]:
        """The batches that are timed, all of them full if there are enough images."""
        pixels, batch = self.read(side).pixels, self.conditions.batch_size
        count = min(self.conditions.timed_images, len(pixels))
        count = max(count // batch * batch, min(batch, count))
        return list(self._batches([pixels[i * len(pixels) // count] for i in range(count)]))

    @cached_property
    def uniform_outputs(self) -> tuple[Tensor, list[float]]:
        return self.outputs(self.uniform, "uniform")

    @torch.inference_mode()
    def outputs(self, prepared: Prepared, name: str) -> tuple[Tensor, list[float]]:
        """(N, C) logits in float32 on the CPU, and the tokens of each image; also the warm-up."""
        logits, tokens = [], []
        batches = self._batches(self.read(prepared.size).pixels)
        for images in self.progress(batches, f"running {name}", len(batches)):
            logits.append(prepared.run(images).float().cpu())
            tokens += prepared.tokens(images)
        return torch.cat(logits), tokens
