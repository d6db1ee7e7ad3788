"""What a benchmark measures, and its results, as values and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from aptvit.hosts.pretrained import check_model
from aptvit.measuring.record import Measurement, Record
from aptvit.measuring.rounds import Paired

__all__ = ["DTYPES", "BenchmarkRecord", "BenchmarkRow", "Case", "Memory", "Mode", "check_cases"]

DTYPES = ("float32", "bfloat16", "float16")
Mode = Literal["infer", "train"]


@dataclass(frozen=True)
class Case:
    """One combination of what is measured.

    Attributes:
        model: timm's name.
        size: Side of the input in pixels; the model's own if None.
        dtype: Number format, one of `DTYPES`. In training, "bfloat16" is autocast over float32 weights.
        batch: Images per batch.
        keep: Share of the patch tokens, on average over the photos. 1 merges nothing, but scores all the same.
        mode: "infer" (images in memory to logits) or "train" (one step of AdamW).
        device: Where it runs.
        scales: Patch sizes, the base size included.
        compiled: Try torch.compile too, and take the faster way of each side.
        thresholds_from: Side in pixels at which the thresholds are calibrated to ``keep``, to be used at ``size``.
        max_photos: Use only that many photos, the first ones.
        graphs: Try CUDA graphs too, of the whole uniform model and of the adaptive one's blocks; only inference.
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
    """Find wrong values before anything runs.

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
            raise ValueError("training in float16 needs a loss scaler, which this is not: use bfloat16 or float32")
        if case.graphs and (case.mode == "train" or not case.device.startswith("cuda")):
            raise ValueError(f"CUDA graphs are for inference on a GPU, not for device={case.device!r}, {case.mode}")
        if case.scales < 2:
            raise ValueError(f"scales={case.scales} must be at least 2: one scale merges nothing")
        for name in ("batch", "size", "thresholds_from", "max_photos"):
            value = getattr(case, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
    devices = {case.device for case in cases}
    if len(devices) > 1:
        raise ValueError(f"one record is of one device, not of {', '.join(sorted(devices))}")
    for model in dict.fromkeys(case.model for case in cases):
        check_model(model)


@dataclass(frozen=True)
class Memory:
    """Bytes of a forward pass, or of a training step.

    Attributes:
        step_uniform: Allocated at the peak beyond those that were live when it began: activations, in training also
            gradients.
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
        """Adaptive over uniform, of what a step allocates."""
        return self.step_adaptive / self.step_uniform

    @property
    def total_ratio(self) -> float:
        """Adaptive over uniform, resident memory included."""
        return (self.step_adaptive + self.resident_adaptive) / (self.step_uniform + self.resident_uniform)


@dataclass(frozen=True)
class BenchmarkRow(Paired, Measurement):
    """The result of one case.

    Attributes:
        case: What was measured.
        image_size: Height and width of the input in pixels.
        thresholds: Thresholds used, from fine to coarse.
        photos: Different photos used; fewer than images where photos had to be repeated to fill a batch.
        keep_mean: Share of the patch tokens kept, on average over the images.
        keep_least: The least share of an image.
        keep_most: The greatest share of an image.
        backend_uniform: "eager", "compile" or "graphs": the fastest of those that were tried.
        backend_adaptive: The same for the adaptive model.
        layout_ms: Milliseconds of scoring and layout per batch, timed alone (median); only for inference.
        embed_ms: Milliseconds of the embedding per batch, likewise.
        outside_ms_uniform: Milliseconds per batch of all but the blocks, which are the same work if nothing merges.
        outside_ms_adaptive: The same for the adaptive model: what it adds is the difference.
        outside_ms_unscored: The same with merging disabled, so that nothing has to be scored.
        memory: Of a forward pass, or of a training step.
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
        """`eta` from the fastest round of each side, which disturbances touch least."""
        return min(self.seconds_uniform) / min(self.seconds_adaptive) / self.flop_ratio

    @property
    def front_share(self) -> float | None:
        """Share of the adaptive forward that scoring, layout and embedding take."""
        if self.layout_ms is None or self.embed_ms is None:
            return None
        return (self.layout_ms + self.embed_ms) * self.throughput_adaptive / (1000 * self.case.batch)

    def added_share(self, outside_ms: float | None) -> float | None:
        """What a model does besides the work of the uniform one, as a share of the uniform forward.

        Args:
            outside_ms: Milliseconds of all but its blocks.
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
    """Rows measured on one machine with one set of versions and photos."""

    row_type = BenchmarkRow
    contents = "a benchmark"
