"""A comparison of a uniform and an adaptive model as a table in the terminal and as a self-contained web page."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from aptvit.measuring.record import plain
from aptvit.measuring.rounds import Paired
from aptvit.measuring.tables import Columns, markdown_table, terminal_page
from aptvit.patching.explanation import MergeDecisions
from aptvit.report.answers import AnswerDrawings
from aptvit.report.drawing import SCALE_COLOURS, draw_patches, to_data_uri
from aptvit.report.why import as_json
from aptvit.storage.writing import write_text

if TYPE_CHECKING:
    from rich.console import Group

_NOT_IN_JSON = ("image", "patches", "drawings", "decisions")
_TIMES = "\N{MULTIPLICATION SIGN}"
_CARD = "<li><strong>{}</strong><span>{}</span><small>{}</small></li>"


@dataclass(frozen=True, eq=False)
class ImageResult:
    """One image with its patches and the outputs of the models.

    Attributes:
        name: File name or path.
        patches: (n, 3) rows (y, x, size) in pixels of the model's input.
        image: (H, W, 3) uint8, the model's input without normalisation.
        tokens: Patch tokens kept.
        tokens_uniform: Patch tokens of the uniform grid.
        agrees: Whether the adaptive model has the same top-1 as the uniform model; None if the weights are random.
        prediction: Name or number of the adaptive model's top-1 class; None where predictions are not compared.
        prediction_uniform: The same of the uniform model.
        truth: Name or number of the class in the labels; None without labels.
        likeness: How alike the two answers are; None where that is not told by one number.
        drawings: Both answers and their difference; None for answers that are only numbers.
        decisions: What was compared with what when the image was cut; None leaves patches unexplained.
    """

    name: str
    patches: np.ndarray
    image: np.ndarray
    tokens: int
    tokens_uniform: int
    agrees: bool | None
    prediction: str | None = None
    prediction_uniform: str | None = None
    truth: str | None = None
    likeness: float | None = None
    drawings: AnswerDrawings | None = None
    decisions: MergeDecisions | None = None


@dataclass(frozen=True)
class Comparison(Paired):
    """A uniform model against its adaptive form, measured on the same images.

    Attributes:
        model: Name of the model.
        weights: Source of the weights: "random", "pretrained" or a file.
        device: Device of the measurement.
        dtype: Type of the computation.
        scorer: Name of the scorer.
        budget: The target, in words.
        thresholds: Scores below which patches are merged, per scale; None where every image keeps a share.
        image_sizes: Heights and widths of the model's inputs in pixels.
        patch_size: Side of a base patch in pixels.
        batch_size: Images per batch.
        tokens_uniform: Mean patch tokens per image of the uniform model.
        keep_ratio: Patch tokens kept over those of the uniform grid, all images.
        keep_spread: Smallest and largest ratio of an image.
        agreement: Share of images with the same top-1, or None if the weights are random or there are no classes.
        top1_uniform: Share of correct answers of the uniform model, where there are labels.
        top1_adaptive: The same for the adaptive model.
        has_size_option: Whether another size of the images can be chosen.
        likeness: Mean over the images of how alike the answers are, for maps, regions, boxes and points.
        likeness_of: What it is.
        cosine: Mean cosine between the outputs of the two models.
        results: The images of the report, which may be fewer than were measured; those with other top-1 first.
        skipped: Messages for files that could not be read.
        environment: Machine and versions, by label.
        command: Command line that reproduces the comparison.
    """

    model: str
    weights: str
    device: str
    dtype: str
    scorer: str
    budget: str
    thresholds: tuple[float, ...] | None
    image_sizes: list[tuple[int, int]]
    patch_size: int
    batch_size: int
    tokens_uniform: float
    keep_ratio: float
    keep_spread: tuple[float, float]
    agreement: float | None
    top1_uniform: float | None = None
    top1_adaptive: float | None = None
    has_size_option: bool = True
    likeness: float | None = None
    likeness_of: str | None = None
    cosine: float | None = None
    results: list[ImageResult] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    command: str | None = None

    @property
    def tokens_adaptive(self) -> float:
        """Mean patch tokens per image of the adaptive model."""
        return self.keep_ratio * self.tokens_uniform

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON: all fields and the derived numbers, without patches, pixels and maps."""
        names = ("tokens_adaptive", "throughput_uniform", "throughput_adaptive", "flop_ratio", "eta")
        values = vars(self) | {name: getattr(self, name) for name in names}
        values["photos"] = [
            {name: value for name, value in vars(result).items() if name not in _NOT_IN_JSON}
            for result in values.pop("results")
        ]
        values["num_photos"] = values["photos_per_round"] = values.pop("images")
        ratio = self.speedup
        return plain(values | {"speedup": ratio.median, "speedup_range": (ratio.least, ratio.most)})


def summary_table(comparison: Comparison) -> Group:
    """The comparison as a table for the terminal, with the key numbers below it."""
    columns: Columns = (
        ("per image", lambda row: row[0]),
        ("uniform", lambda row: _number(row[1])),
        ("adaptive", lambda row: f"**{_number(row[2])}**"),
    )
    title = f"{comparison.model}, {_count(comparison.images, 'photo')}, {comparison.device} {comparison.dtype}"
    lines = [f"{label}: {value}{note and f' ({note})'}" for label, value, note in _findings(comparison)]
    findings = "\n".join([*lines, *(f"next: {step}" for step in _next_steps(comparison))])
    return terminal_page(title, markdown_table(columns, _rows(comparison)), findings)


def write_report(comparison: Comparison, folder: Path | str) -> Path:
    """Write the comparison as one self-contained web page, `index.html`, and return its path.

    Args:
        comparison: The comparison.
        folder: Folder of the page; created if it does not exist.

    Raises:
        ValueError: The folder or the file cannot be written, or the patches of an image do not tile it.
    """
    page = Path(folder) / "index.html"
    html = _page(comparison)
    try:
        write_text(page, html, errors="replace")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot write a report to {folder} ({reason}); choose another folder") from error
    return page


def _rows(c: Comparison) -> list[tuple[str, float, float]]:
    return [
        ("patch tokens", c.tokens_uniform, c.tokens_adaptive),
        ("GFLOPs", c.gflops_uniform, c.gflops_adaptive),
        ("milliseconds", 1000 / c.throughput_uniform, 1000 / c.throughput_adaptive),
        ("images/s", c.throughput_uniform, c.throughput_adaptive),
    ]


def _findings(c: Comparison) -> list[tuple[str, str, str]]:
    """Label, value and note of the key numbers."""
    least, most = (_percent(share) for share in c.keep_spread)
    ratio, rounds = c.speedup, _count(len(c.seconds_uniform), "round")
    findings = [
        ("patch tokens kept", _percent(c.keep_ratio), f"{least} to {most} from photo to photo"),
        ("speed-up", f"{ratio.median:.2f}{_TIMES}", f"{ratio.least:.2f} to {ratio.most:.2f} over {rounds}"),
        ("FLOP ratio", f"{c.flop_ratio:.2f}{_TIMES}", "uniform over adaptive"),
        ("eta", f"{c.eta:.2f}", "share of the saved FLOPs that became saved time"),
    ]
    if c.agreement is not None:
        findings.append(("same top-1 as uniform", _percent(c.agreement), f"of {_count(c.images, 'photo')}"))
    elif c.weights == "random":
        findings.append(("same top-1 as uniform", "n/a", "the weights are random, so agreement is not shown"))
    if c.top1_uniform is not None and c.top1_adaptive is not None:
        findings.append(("top-1 accuracy", f"{100 * c.top1_adaptive:.2f} %", f"{100 * c.top1_uniform:.2f} % uniform"))
    if c.likeness is not None and c.likeness_of is not None:
        findings.append((c.likeness_of, f"{c.likeness:.4f}", "mean over the photos"))
    if c.cosine is not None:
        findings.append(("cosine", f"{c.cosine:.4f}", "between the outputs of the two models"))
    return findings


def _page(c: Comparison) -> str:
    template = resources.files("aptvit.report").joinpath("report.html").read_text(encoding="utf-8")
    skipped = "".join(f"<li>{escape(message)}</li>" for message in c.skipped)
    return Template(template).substitute(
        model=escape(c.model),
        photo_count=_count(c.images, "photo"),
        sentence=escape(_sentence(c)),
        next_steps="".join(f'<p class="next">To try next: {escape(step)}.</p>' for step in _next_steps(c)),
        cards="".join(_CARD.format(*map(escape, (value, label, note))) for label, value, note in _findings(c)),
        rows="".join(_row(*row) for row in _rows(c)),
        photos=_image_section(c) if c.results else "",
        skipped=skipped and f'<section><h2>Skipped files</h2><ul class="skipped">{skipped}</ul></section>',
        settings="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _settings(c)),
        command="" if c.command is None else f"<h3>Run it again</h3><pre><code>{escape(c.command)}</code></pre>",
    )


def _sentence(c: Comparison) -> str:
    speedup = c.speedup.median
    speed = f"{max(speedup, 1 / speedup):.1f}{_TIMES} {'faster than' if speedup > 1 else 'slower than'}"
    speed = "as fast as" if 1 / 1.05 < speedup < 1.05 else speed
    sentence = f"{_percent(c.keep_ratio)} of the patch tokens, {speed} the uniform model"
    if c.agreement is None:
        return f"{sentence}."
    if c.images == 1:
        return f"{sentence}, and {'the same' if c.agreement == 1 else 'another'} answer."
    return f"{sentence}, and the same answer on {_percent(c.agreement)} of the photos."


def _next_steps(c: Comparison) -> list[str]:
    """What to try where the adaptive model is no faster, or its answers are worse."""
    steps = []
    if c.speedup.median <= 1:
        is_small = c.has_size_option and c.tokens_uniform < 1000
        larger = f"larger images (--img-size {2 * max(c.image_sizes[-1])}), " if is_small else ""
        fewer = f"--batch-size {4 * c.batch_size}, or fewer tokens (--keep {0.7 * c.keep_ratio:.2f})"
        steps.append(f"it is not faster, as small inputs and batches hardly are: {larger}{fewer}")
    uniform, adaptive = c.top1_uniform, c.top1_adaptive
    fewer_right = uniform is not None and adaptive is not None and adaptive < uniform - 0.01
    if fewer_right or (c.agreement is not None and c.agreement < 0.9):
        steps.append(
            f"answers differ: aptvit heal trains the model to answer as before, without labels; --keep "
            f"{min(1, 1.3 * c.keep_ratio):.2f} or --scorer glance merges less of what it looks at; aptvit evaluate "
            "--methods apt-entropy,downscale tells whether a smaller image does as well"
        )
    return steps


def _row(label: str, uniform: float, adaptive: float) -> str:
    longest = max(uniform, adaptive)
    cells = "".join(
        f'<td>{_number(value)}<i class="{kind}" style="width:{100 * value / longest:.1f}%"></i></td>'
        for kind, value in (("uniform", uniform), ("adaptive", adaptive))
    )
    return f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'


def _settings(c: Comparison) -> list[tuple[str, str]]:
    names = ("model", "weights", "scorer", "budget", "thresholds", "dtype", "batch_size", "patch_size")
    settings = [(name.replace("_", " "), _words(getattr(c, name))) for name in names if getattr(c, name) is not None]
    timing = f"median of {_count(len(c.seconds_uniform), 'interleaved round')} of {_count(c.images, 'photo')}"
    sizes = [f" {_TIMES} ".join(map(str, size)) for size in c.image_sizes]
    sizes = sizes if len(sizes) < 4 else [sizes[0], f"and {len(sizes) - 2} sizes up to", sizes[-1]]
    return [*settings, ("input", f"{', '.join(sizes)} pixels"), ("timing", timing), *c.environment.items()]


def _words(value: Any) -> str:
    return ", ".join(f"{part:.4g}" for part in value) if isinstance(value, tuple) else str(value)


def _image_section(c: Comparison) -> str:
    scales = sorted({int(size) // c.patch_size for result in c.results for size in np.unique(result.patches[:, 2])})
    legend = "".join(
        f'<li><i style="background:rgb{_colour(scale)}"></i>{scale * c.patch_size} pixels</li>' for scale in scales
    )
    count = f"{len(c.results)} of {c.images} photos. " if len(c.results) < c.images else ""
    figures = "".join(_figure(result, c.patch_size) for result in c.results)
    return (
        f"<section><h2>Where the patches went</h2><p>{count}Choose a patch, or move with the arrow keys, to see why it "
        f'was merged or not.</p><ul class="legend" aria-label="Patch sizes">{legend}</ul>'
        f'<div class="photos">{figures}</div></section>'
    )


def _colour(scale: int) -> tuple[int, int, int]:
    """Colour of patches that are `scale` times the size of a base patch."""
    return SCALE_COLOURS[min(scale.bit_length(), len(SCALE_COLOURS)) - 1]


def _figure(result: ImageResult, patch_size: int) -> str:
    height, width = result.image.shape[:2]
    name = escape(result.name)
    plain = to_data_uri(Image.fromarray(result.image), quality=90)
    drawn = to_data_uri(draw_patches(result.image, result.patches, patch_size))
    size = f'width="{width}" height="{height}"'
    tokens = f"{result.tokens} of {result.tokens_uniform} tokens"
    answer = _answers(result)
    if result.agrees is not None:
        kind, words = ("same", "same top-1") if result.agrees else ("other", "other top-1")
        answer += f'<span class="badge {kind}">{words}</span>'
    if result.likeness is not None:
        answer += f"likeness {result.likeness:.3f}"
    share = result.tokens / result.tokens_uniform
    reasons = "" if result.decisions is None else escape(as_json(result.decisions))
    return (
        f'<figure data-why="{reasons}"><div class="cut" tabindex="0" aria-label="Patches of {name}">'
        f'<img class="plain" src="{plain}" {size} alt="{name}">'
        f'<img class="drawn" src="{drawn}" {size} alt="{name} with its patches, {tokens}"><i class="frame"></i></div>'
        f'{_drawings(result)}<div class="why" aria-live="polite"></div>'
        f'<figcaption><label><input type="checkbox" aria-label="Hide the patches of {name}">hide patches</label>'
        f'<b title="{name}">{escape(Path(result.name).name)}</b>'
        f'<span class="meter"><i style="width:{share:.1%}"></i></span>'
        f"<span>{tokens} ({_percent(share)})</span><span>{answer}</span></figcaption></figure>"
    )


def _answers(result: ImageResult) -> str:
    """What both models answered, and the class in the labels."""
    answers = {"adaptive": result.prediction, "uniform": result.prediction_uniform, "label": result.truth}
    if result.agrees and result.prediction is not None:
        answers = {"both": result.prediction, "label": result.truth}
    return "".join(
        f'<span class="answer"><small>{side}</small> {escape(name)}</span>'
        for side, name in answers.items()
        if name is not None
    )


def _drawings(result: ImageResult) -> str:
    """Both answers and their difference, side by side."""
    if result.drawings is None:
        return ""
    images = ""
    for name in ("uniform", "adaptive", "difference"):
        drawing = getattr(result.drawings, name)
        about = "where they differ" if name == "difference" else f"answer of the {name} model"
        images += f'<span><img src="{to_data_uri(drawing)}" alt="{about}"><small>{name}</small></span>'
    return f'<div class="answers">{images}</div>'


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _percent(share: float) -> str:
    if 0.99 < share < 1:  # not rounded up to 100 %
        return f"{math.floor(1000 * share) / 10:.1f} %"
    return f"{100 * share:.0f} %"


def _number(value: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
