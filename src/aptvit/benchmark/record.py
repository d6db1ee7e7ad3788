"""The cases, the rows and the record of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from aptvit.hosts.pretrained import check_model
from aptvit.measuring.record import Measurement, Record
from aptvit.measuring.rounds import Paired

__all__ = ["DTYPES", "BenchmarkRecord", "BenchmarkRow", "Case", "Memory", "Mode", "check_cases"]

DTYPES = ("float32", "bfloat16", "float16")
Mode = Literal["infer", "train"]


@dataclass(frozen=True)
class Case:
    """A case of a benchmark: a model and the conditions of its measurement.

    Attributes:
        model: timm's name of the host.
        size: Side of the input in pixels; the model's own if None.
        dtype: Type of the computation, one of `DTYPES`. In training, "bfloat16" is autocast over float32 weights.
        batch: Images per batch.
        keep: Mean share of the patch tokens over the images. At 1, patches are scored and nothing is merged.
        mode: "infer" (images in memory to logits) or "train" (a step of AdamW).
        device: Device of both models.
        scales: Number of patch sizes, the base size included.
        compiled: Time torch.compile too; the fastest backend of each model counts.
        thresholds_from: Side in pixels at which the thresholds are calibrated to ``keep``; ``size`` if None.
        max_photos: Number of images to use, the first of the list; all if None.
        graphs: Time CUDA graphs too, of the whole uniform model and of the adaptive model's blocks; for inference.
    """

    model: str
    size: int | None = None
    dtype: str = "float32"
    batch: int = 8
    keep: float = 0.5
    mode: Mode = "infer"
    device: str = "cpu"
    scales: int = 2
    compiled: bool = False
    thresholds_from: int | None = None
    max_photos: int | None = None
    graphs: bool = False


def check_cases(cases: Sequence[Case]) -> None:
    """Check all values before anything runs.

    Raises:
        ValueError: If there are no cases, a value is out of range, or a model does not exist or cannot be adapted.
    """
    if not cases:
        raise ValueError("there is nothing to measure: give at least one model, batch size, type and share")
    for case in cases:
        if not 0 < case.keep <= 1:
            raise ValueError(f"keep={case.keep:g} must be a share of the patch tokens in (0, 1]")
        for name, choices in (("dtype", DTYPES), ("mode", get_args(Mode))):
            if getattr(case, name) not in choices:
                raise ValueError(f"{name}={getattr(case, name)!r} must be one of {', '.join(choices)}")
        if case.mode == "train" and case.dtype == "float16":
            raise ValueError("training in float16 needs a loss scaler: use bfloat16 or float32")
        if case.graphs and (case.mode == "train" or not case.device.startswith("cuda")):
            raise ValueError(f"CUDA graphs are for inference on a GPU, not for device={case.device!r}, {case.mode}")
        for name, least in (("scales", 2), ("batch", 1), ("size", 1), ("thresholds_from", 1), ("max_photos", 1)):
            value = getattr(case, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
    devices = {case.device for case in cases}
    if len(devices) > 1:
        raise ValueError(f"one record is of one device, not of {', '.join(sorted(devices))}")
    for model in dict.fromkeys(case.model for case in cases):
        if not Path(model).is_dir():  # of a saved model
            check_model(model)


@dataclass(frozen=True)
class Memory:
    """Memory of a forward pass or of a training step, in bytes.

    Attributes:
        step_uniform: Peak beyond the memory that was allocated before: activations, and gradients in training.
        step_adaptive: The same for the adaptive model.
        resident_uniform: Weights, buffers and, in training, optimizer state, which stay allocated.
        resident_adaptive: The same for the adaptive model.
    """

    step_uniform: int
    step_adaptive: int
    resident_uniform: int
    resident_adaptive: int

    @property
    def step_ratio(self) -> float:
        """Peak memory of a step of the adaptive model over that of the uniform model."""
        return self.step_adaptive / self.step_uniform

    @property
    def total_ratio(self) -> float:
        """The same with resident memory."""
        return (self.step_adaptive + self.resident_adaptive) / (self.step_uniform + self.resident_uniform)


@dataclass(frozen=True)
class BenchmarkRow(Paired, Measurement):
    """The result of one case.

    Attributes:
        case: The case.
        image_size: Height and width of the input in pixels.
        thresholds: Thresholds, from fine to coarse.
        photos: Number of distinct images; fewer than ``images`` where images are repeated to fill a batch.
        keep_mean: Mean share of the patch tokens over the images.
        keep_least: Least share of an image.
        keep_most: Greatest share of an image.
        backend_uniform: "eager", "compile" or "graphs": the fastest backend.
        backend_adaptive: The same for the adaptive model.
        layout_ms: Median milliseconds of scoring and layout per batch; None in training.
        embed_ms: Median milliseconds of the embedding per batch; None in training.
        outside_ms_uniform: Milliseconds per batch of the model without its blocks; None where patches are merged.
        outside_ms_adaptive: The same for the adaptive model: the difference is its overhead.
        outside_ms_unscored: The same with merging disabled, so that nothing is scored.
        memory: Memory of a forward pass or of a training step.
    """

    identity: ClassVar[tuple[str, ...]] = ("case",)

    case: Case
    image_size: tuple[int, int] = (0, 0)
    thresholds: tuple[float, ...] = ()
    photos: int = 0
    keep_mean: float = 0.0
    keep_least: float = 0.0
    keep_most: float = 0.0
    backend_uniform: str = "eager"
    backend_adaptive: str = "eager"
    layout_ms: float | None = None
    embed_ms: float | None = None
    outside_ms_uniform: float | None = None
    outside_ms_adaptive: float | None = None
    outside_ms_unscored: float | None = None
    memory: Memory | None = None

    @property
    def eta_of_least(self) -> float:
        """`eta` from the fastest round of each model, which is least disturbed."""
        return min(self.seconds_uniform) / min(self.seconds_adaptive) / self.flop_ratio

    @property
    def front_share(self) -> float | None:
        """Share of the adaptive forward that scoring, layout and embedding take."""
        if self.layout_ms is None or self.embed_ms is None:
            return None
        return (self.layout_ms + self.embed_ms) * self.throughput_adaptive / (1000 * self.case.batch)

    def added_share(self, outside_ms: float | None) -> float | None:
        """Overhead of a model relative to the time of the uniform forward.

        Args:
            outside_ms: Milliseconds per batch of the model without its blocks.
        """
        if self.outside_ms_uniform is None or outside_ms is None:
            return None
        return (outside_ms - self.outside_ms_uniform) * self.throughput_uniform / (1000 * self.case.batch)

    def derived(self) -> dict[str, Any]:
        names = ("flop_ratio", "eta", "eta_of_least", "front_share", "throughput_uniform", "throughput_adaptive")
        memory = self.memory and {"step": self.memory.step_ratio, "total": self.memory.total_ratio}
        return {name: getattr(self, name) for name in (*names, "speedup")} | {
            "rounds": len(self.seconds_uniform),
            "added_share": self.added_share(self.outside_ms_adaptive),
            "added_share_unscored": self.added_share(self.outside_ms_unscored),
            **({"memory_ratio": memory} if memory else {}),
        }


class BenchmarkRecord(Record[BenchmarkRow]):
    """Rows measured on one machine with one set of versions and of images."""

    row_type = BenchmarkRow
    contents = "a benchmark"
