"""What a benchmark asked and what it found, as values and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from aptvit.hosts.pretrained import check_model
from aptvit.measuring.records import write_json
from aptvit.measuring.timing import Spread

__all__ = ["DTYPES", "Case", "Memory", "Mode", "Record", "Row", "check_cases"]

DTYPES = ("float32", "bfloat16", "float16")
Mode = Literal["infer", "train"]


@dataclass(frozen=True)
class Case:
    """One thing to measure.

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
        if case.dtype not in DTYPES:
            raise ValueError(f"dtype={case.dtype!r} must be one of {', '.join(DTYPES)}")
        if case.mode not in get_args(Mode):
            raise ValueError(f"mode={case.mode!r} must be one of {', '.join(get_args(Mode))}")
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
        step_uniform: Allocated at the peak beyond what was live when it began: activations, in training also
            gradients.
        step_adaptive: The same for the adaptive model.
        resident_uniform: Weights, buffers and, in training, optimizer state, which are there all the time.
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
class Row:
    """What was found in one case; numbers are missing where ``error`` says why.

    Attributes:
        case: What was asked.
        error: Why it failed.
        image_size: Height and width of the input in pixels.
        thresholds: Thresholds used, from fine to coarse.
        photos: Different photos used.
        images: Images of a round; more than ``photos`` where photos had to be repeated to fill a batch.
        keep_mean: Share of the patch tokens kept, on average over the images.
        keep_least: The least share of an image.
        keep_most: The greatest share of an image.
        gflops_uniform: Billions of operations per image; a multiply and an add count as two.
        gflops_adaptive: The same for the adaptive model.
        seconds_uniform: Seconds of each round, all images; paired with those of the other list.
        seconds_adaptive: The same for the adaptive model.
        backend_uniform: "eager", "compile" or "graphs": the fastest of what was tried.
        backend_adaptive: The same for the adaptive model.
        layout_ms: Milliseconds of scoring and layout per batch, timed alone (median); only for inference.
        embed_ms: Milliseconds of the embedding per batch, likewise.
        outside_ms_uniform: Milliseconds per batch of all but the blocks, which are the same work if nothing merges.
        outside_ms_adaptive: The same for the adaptive model: what it adds is the difference.
        outside_ms_unscored: The same where it is told to merge nothing, so that nothing has to be scored.
        memory: Of a forward pass, or of a training step.
    """

    case: Case
    error: str | None = None
    image_size: tuple[int, int] = (0, 0)
    thresholds: tuple[float, ...] = ()
    photos: int = 0
    images: int = 0
    keep_mean: float = 0.0
    keep_least: float = 0.0
    keep_most: float = 0.0
    gflops_uniform: float = 0.0
    gflops_adaptive: float = 0.0
    seconds_uniform: tuple[float, ...] = ()
    seconds_adaptive: tuple[float, ...] = ()
    backend_uniform: str = "eager"
    backend_adaptive: str = "eager"
    layout_ms: float | None = None
    embed_ms: float | None = None
    outside_ms_uniform: float | None = None
    outside_ms_adaptive: float | None = None
    outside_ms_unscored: float | None = None
    memory: Memory | None = None

    @property
    def rounds(self) -> int:
        return len(self.seconds_uniform)

    @property
    def flop_ratio(self) -> float:
        """Operations of the uniform over those of the adaptive model."""
        return self.gflops_uniform / self.gflops_adaptive

    @property
    def speedup(self) -> Spread:
        """Time of the uniform over that of the adaptive model, over the rounds."""
        return Spread.of_ratios(self.seconds_uniform, self.seconds_adaptive)

    @property
    def eta(self) -> float:
        """Median speed-up over operation ratio: how much of the saved operations became saved time, 1 is all."""
        return self.speedup.median / self.flop_ratio

    @property
    def eta_of_least(self) -> float:
        """The same from the fastest round of each side, which disturbances touch least."""
        return min(self.seconds_uniform) / min(self.seconds_adaptive) / self.flop_ratio

    @property
    def throughput_uniform(self) -> float:
        """Images per second in the median round."""
        return self.images / statistics.median(self.seconds_uniform)

    @property
    def throughput_adaptive(self) -> float:
        """The same for the adaptive model."""
        return self.images / statistics.median(self.seconds_adaptive)

    @property
    def front_share(self) -> float | None:
        """Share of the adaptive forward that scoring, layout and embedding take."""
        if self.layout_ms is None or self.embed_ms is None:
            return None
        whole_ms = 1000 * self.case.batch / self.throughput_adaptive
        return (self.layout_ms + self.embed_ms) / whole_ms

    @property
    def added_share(self) -> float | None:
        """What the adaptive model does besides the uniform one's work, as a share of the uniform forward."""
        return self._added(self.outside_ms_adaptive)

    @property
    def added_share_unscored(self) -> float | None:
        """The same where it is told to merge nothing."""
        return self._added(self.outside_ms_unscored)

    def _added(self, outside_ms: float | None) -> float | None:
        if self.outside_ms_uniform is None or outside_ms is None:
            return None
        whole_ms = 1000 * self.case.batch / self.throughput_uniform
        return (outside_ms - self.outside_ms_uniform) / whole_ms

    def to_dict(self) -> dict[str, Any]:
        """All numbers, the derived ones too, as plain values for JSON."""
        if self.error is not None:
            return {"case": asdict(self.case), "error": self.error}
        derived: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                *("rounds", "flop_ratio", "eta", "eta_of_least", "front_share"),
                *("added_share", "added_share_unscored", "throughput_uniform", "throughput_adaptive"),
            )
        }
        derived["speedup"] = asdict(self.speedup)
        if self.memory is not None:
            derived["memory_ratio"] = {"step": self.memory.step_ratio, "total": self.memory.total_ratio}
        return {**asdict(self), **derived}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """What `to_dict` gave, read from JSON; derived numbers are computed again."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name in ("image_size", "thresholds", "seconds_uniform", "seconds_adaptive"):
            if name in known:
                known[name] = tuple(known[name])
        known["case"] = Case(**known["case"])
        if known.get("memory") is not None:
            known["memory"] = Memory(**known["memory"])
        return cls(**known)


@dataclass
class Record:
    """Rows measured on one machine with one set of versions and photos.

    Attributes:
        environment: Device, machine, versions and photos, by label.
        commands: Command lines that made the rows.
        rows: What was found.
        skipped: Messages for photos that could not be read.
    """

    environment: dict[str, str]
    commands: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def find(self, case: Case) -> Row | None:
        """The row of a case, if it was measured without an error."""
        return next((row for row in self.rows if row.case == case and row.error is None), None)

    def put(self, row: Row) -> None:
        """Add a row, in the place of an earlier one of the same case."""
        self.rows = [other for other in self.rows if other.case != row.case] + [row]

    @property
    def measured(self) -> list[Row]:
        """Rows without an error."""
        return [row for row in self.rows if row.error is None]

    @property
    def failed(self) -> list[Row]:
        """Rows with an error."""
        return [row for row in self.rows if row.error is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "commands": self.commands,
            "environment": self.environment,
            "skipped": self.skipped,
            "rows": [row.to_dict() for row in self.rows],
        }

    def save(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote.

        Raises:
            ValueError: If the file does not hold a record.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row.from_dict(row) for row in values["rows"]]
            return cls(values["environment"], values["commands"], rows, values["skipped"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold a benchmark ({type(error).__name__}: {error})") from None
