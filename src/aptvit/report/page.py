"""What a person sees of a comparison: a table in the terminal and a self-contained web page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table
from rich.text import Text

from aptvit.report.drawing import SCALE_COLOURS, draw_patches, to_data_uri

_TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True, eq=False)
class PhotoResult:
    """One photo and its patches.

    Attributes:
        name: File name or path as given.
        patches: (n, 3) rows (y, x, size) in pixels of the model's input.
        picture: What the model saw, (H, W, 3) uint8.
        tokens: Patch tokens kept.
        tokens_uniform: Patch tokens of the uniform grid.
        agrees: Whether the adaptive model has the same top-1 as the uniform one; None if the weights are random.
        prediction: Top-1 of the adaptive model as a word, if known.
    """

    name: str
    patches: np.ndarray
    picture: np.ndarray
    tokens: int
    tokens_uniform: int
    agrees: bool | None
    prediction: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A uniform model against its adaptive form, measured on the same photos.

    Attributes:
        model: Name of the model.
        weights: "random" or what the weights are.
        device: Where it ran.
        dtype: Number format it ran in.
        scorer: What decided on patch sizes.
        budget: How many tokens were asked for, in words.
        thresholds: Scores below which patches are merged, per scale, if there are any.
        image_size: Height and width of the model's input in pixels.
        patch_size: Side of a base patch in pixels.
        batch_size: Photos per batch.
        num_photos: Photos measured; may be more than there are in `photos`.
        keep_ratio: Patch tokens kept over those of the uniform grid, all photos.
        keep_spread: The smallest and the largest of that ratio over photos.
        gflops_uniform: Billions of operations per image; a multiply and an add count as two.
        gflops_adaptive: The same for the adaptive model.
        seconds_uniform: Seconds per round over all timed photos; round i is paired with round i of the other list.
        seconds_adaptive: The same for the adaptive model.
        photos_per_round: Photos that a round processes.
        agreement: Share of photos with the same top-1, or None if the weights are random or there are no classes.
        top1_uniform: Share of correct answers of the uniform model, if labels are known.
        top1_adaptive: The same for the adaptive model.
        cosine: Mean cosine between the outputs of the two models.
        photos: Photos to show.
        skipped: Messages for files that could not be read.
        environment: Machine and versions, by label.
        command: Command that reproduces the comparison.

    Raises:
        ValueError: The rounds do not pair up, or a time, an operation count or `photos_per_round` is not positive.
    """

    model: str
    weights: str
    device: str
    dtype: str
    scorer: str
    budget: str
    thresholds: tuple[float, ...] | None
    image_size: tuple[int, int]
    patch_size: int
    batch_size: int
    num_photos: int
    keep_ratio: float
    keep_spread: tuple[float, float]
    gflops_uniform: float
    gflops_adaptive: float
    seconds_uniform: list[float]
    seconds_adaptive: list[float]
    photos_per_round: int
    agreement: float | None
    top1_uniform: float | None = None
    top1_adaptive: float | None = None
    cosine: float | None = None
    photos: list[PhotoResult] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    command: str | None = None

    def __post_init__(self) -> None:
        if not self.seconds_uniform or len(self.seconds_uniform) != len(self.seconds_adaptive):
            counts = f"{len(self.seconds_uniform)} uniform and {len(self.seconds_adaptive)} adaptive"
            raise ValueError(f"{counts} rounds; time both models in the same number of rounds, at least one")
        divisors = [*self.seconds_uniform, *self.seconds_adaptive, self.gflops_uniform, self.gflops_adaptive]
        if min(*divisors, self.photos_per_round) <= 0:
            raise ValueError("seconds, gflops and photos_per_round must be positive")

    @property
    def tokens_uniform(self) -> int:
        """Patch tokens per image of the uniform model."""
        return (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)

    @property
    def tokens_adaptive(self) -> float:
        """Mean patch tokens per image of the adaptive model."""
        return self.keep_ratio * self.tokens_uniform

    @property
    def throughput_uniform(self) -> float:
        """Images per second of the uniform model in the median round."""
        return self.photos_per_round / statistics.median(self.seconds_uniform)

    @property
    def throughput_adaptive(self) -> float:
        """Images per second of the adaptive model in the median round."""
        return self.photos_per_round / statistics.median(self.seconds_adaptive)

    @property
    def speedup(self) -> float:
        """Median over rounds of the time of the uniform over that of the adaptive model."""
        return statistics.median(self._speedups())

    @property
    def speedup_range(self) -> tuple[float, float]:
        """Smallest and largest speed-up of a round."""
        return min(self._speedups()), max(self._speedups())

    @property
    def flop_ratio(self) -> float:
        """Operations of the uniform over those of the adaptive model."""
        return self.gflops_uniform / self.gflops_adaptive

    @property
    def eta(self) -> float:
        """Speed-up over operation ratio: how much of the saved operations became saved time, 1 is all."""
        return self.speedup / self.flop_ratio

    def to_dict(self, patches: bool = False) -> dict[str, Any]:
        """All numbers, the derived ones too, as plain values for JSON.

        Args:
            patches: Include the patches of each photo. Pixels are never included.
        """
        result = {f.name: getattr(self, f.name) for f in fields(self)}
        derived = ("tokens_uniform", "tokens_adaptive", "throughput_uniform", "throughput_adaptive")
        for name in (*derived, "speedup", "speedup_range", "flop_ratio", "eta"):
            result[name] = getattr(self, name)
        hidden = {"picture"} if patches else {"picture", "patches"}
        result["photos"] = [
            {f.name: getattr(photo, f.name) for f in fields(photo) if f.name not in hidden} for photo in self.photos
        ]
        plain = _plain(result)
        assert isinstance(plain, dict)
        return plain

    def _speedups(self) -> list[float]:
        return [u / a for u, a in zip(self.seconds_uniform, self.seconds_adaptive, strict=True)]


def summary_table(comparison: Comparison) -> Table:
    """The comparison as a table for the terminal, with the verdict below it."""
    caption = Text("\n".join(f"{label}: {value}" if value else label for label, value in _verdicts(comparison)))
    title = f"{comparison.model}, {_count(comparison.num_photos, 'photo')}, {comparison.device} {comparison.dtype}"
    table = Table(title=Text(title), caption=caption, title_justify="left", caption_justify="left", min_width=78)
    table.title_style, table.caption_style = "bold", ""
    table.add_column("per image")
    table.add_column("uniform", justify="right")
    table.add_column("adaptive", justify="right", style="bold")
    for label, uniform, adaptive in _rows(comparison):
        table.add_row(label, _number(uniform), _number(adaptive))
    return table


def write_report(comparison: Comparison, folder: Path | str) -> Path:
    """Write the comparison as one self-contained web page, `index.html`, and return its path.

    Args:
        comparison: What to show.
        folder: Where to write; created if it does not exist.

    Raises:
        ValueError: The folder or the file cannot be written, or the patches of a photo do not tile its picture.
    """
    page = Path(folder) / "index.html"
    html = _page(comparison)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(html, encoding="utf-8", errors="replace")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot write a report to {folder} ({reason}); choose another folder") from error
    return page


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _rows(c: Comparison) -> list[tuple[str, float, float]]:
    return [
        ("patch tokens", c.tokens_uniform, c.tokens_adaptive),
        ("GFLOPs", c.gflops_uniform, c.gflops_adaptive),
        ("milliseconds", 1000 / c.throughput_uniform, 1000 / c.throughput_adaptive),
        ("images/s", c.throughput_uniform, c.throughput_adaptive),
    ]


def _verdicts(c: Comparison) -> list[tuple[str, str]]:
    """Label and value of what the comparison comes to; a remark without a value has an empty one."""
    low, high = c.speedup_range
    verdicts = [
        ("speed-up", f"{c.speedup:.2f}{_TIMES} (rounds {low:.2f} to {high:.2f})"),
        ("FLOP ratio", f"{c.flop_ratio:.2f}{_TIMES}"),
        ("eta", f"{c.eta:.2f} (share of the saved FLOPs that became saved time)"),
    ]
    if c.agreement is not None:
        verdicts.append(("same top-1 as uniform", f"{_percent(c.agreement)} of {_count(c.num_photos, 'photo')}"))
    elif c.weights == "random":
        verdicts.append(("the weights are random, so agreement is not shown", ""))
    if c.top1_uniform is not None and c.top1_adaptive is not None:
        verdicts.append(
            ("top-1 accuracy", f"{100 * c.top1_uniform:.2f} % uniform, {100 * c.top1_adaptive:.2f} % adaptive")
        )
    if c.cosine is not None:
        verdicts.append(("cosine between outputs", f"{c.cosine:.4f}"))
    return verdicts


def _page(c: Comparison) -> str:
    template = resources.files("aptvit.report").joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        model=escape(c.model),
        photo_count=_count(c.num_photos, "photo"),
        sentence=escape(_sentence(c)),
        cards="".join(_card(*card) for card in _cards(c)),
        rows="".join(_row(*row) for row in _rows(c)),
        verdicts=_definitions((label, value or "") for label, value in _verdicts(c)),
        photos=_photo_section(c),
        skipped=_skipped_section(c.skipped),
        settings=_definitions(_settings(c)),
        command="" if c.command is None else f"<h3>Run it again</h3><pre><code>{escape(c.command)}</code></pre>",
    )


def _sentence(c: Comparison) -> str:
    if c.speedup >= 1.05:
        speed = f"{c.speedup:.1f}{_TIMES} faster than the uniform model"
    elif c.speedup > 1 / 1.05:
        speed = "as fast as the uniform model"
    else:
        speed = f"{1 / c.speedup:.1f}{_TIMES} slower than the uniform model"
    sentence = f"{_percent(c.keep_ratio)} of the patch tokens, {speed}"
    if c.agreement is None:
        return f"{sentence}."
    if c.num_photos == 1:
        return f"{sentence}, and {'the same' if c.agreement == 1 else 'another'} answer."
    return f"{sentence}, and the same answer on {_percent(c.agreement)} of the photos."


def _cards(c: Comparison) -> list[tuple[str, str, str]]:
    """Value, label and note of the key numbers."""
    low, high = c.speedup_range
    least, most = c.keep_spread
    cards = [
        (_percent(c.keep_ratio), "of the patch tokens", f"{_percent(least)} to {_percent(most)} from photo to photo"),
        (
            f"{c.speedup:.2f}{_TIMES}",
            "speed-up",
            f"{low:.2f} to {high:.2f} over {_count(len(c.seconds_uniform), 'round')}",
        ),
        (
            f"{c.flop_ratio:.2f}{_TIMES}",
            "FLOP ratio",
            f"eta {c.eta:.2f}: share of the saved FLOPs that became saved time",
        ),
    ]
    if c.agreement is not None:
        cards.append((_percent(c.agreement), "same top-1", "as the uniform model"))
    elif c.weights == "random":
        cards.append(("n/a", "same top-1", "weights are random, so not shown"))
    elif c.cosine is not None:
        cards.append((f"{c.cosine:.3f}", "cosine", "between the outputs of the two models"))
    return cards


def _card(value: str, label: str, note: str) -> str:
    return f"<li><strong>{escape(value)}</strong><span>{escape(label)}</span><small>{escape(note)}</small></li>"


def _row(label: str, uniform: float, adaptive: float) -> str:
    longest = max(uniform, adaptive)
    cells = "".join(
        f'<td>{_number(value)}<i class="{kind}" style="width:{100 * value / longest:.1f}%"></i></td>'
        for kind, value in (("uniform", uniform), ("adaptive", adaptive))
    )
    return f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'


def _settings(c: Comparison) -> list[tuple[str, str]]:
    height, width = c.image_size
    photos = _count(c.photos_per_round, "photo")
    settings = [
        ("model", c.model),
        ("weights", c.weights),
        ("input", f"{height} {_TIMES} {width} pixels, base patches of {c.patch_size}"),
        ("scorer", c.scorer),
        ("budget", c.budget),
        ("device", f"{c.device}, {c.dtype}, batches of {c.batch_size}"),
        ("timing", f"median of {_count(len(c.seconds_uniform), 'interleaved round')} of {photos}"),
        ("FLOPs", "a multiply and an add count as two"),
    ]
    if c.thresholds is not None:
        settings.append(("thresholds", ", ".join(f"{threshold:.4g}" for threshold in c.thresholds)))
    return settings + list(c.environment.items())


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f"<div><dt>{escape(label)}</dt>" + (f"<dd>{escape(value)}</dd>" if value else "") + "</div>"
        for label, value in pairs
    )


def _photo_section(c: Comparison) -> str:
    if not c.photos:
        return ""
    scales = sorted({int(size) // c.patch_size for photo in c.photos for size in np.unique(photo.patches[:, 2])})
    legend = "".join(
        f'<li><i style="background:rgb{_colour(scale)}"></i>{scale * c.patch_size} pixels</li>' for scale in scales
    )
    shown = f"{len(c.photos)} of {c.num_photos} photos. " if len(c.photos) < c.num_photos else ""
    figures = "".join(_figure(photo, c.patch_size) for photo in c.photos)
    return (
        f"<section><h2>Where the patches went</h2><p>{shown}Point at a photo, or tap it, to see it without patches."
        f'</p><ul class="legend" aria-label="Patch sizes">{legend}</ul><div class="photos">{figures}</div></section>'
    )


def _colour(scale: int) -> tuple[int, int, int]:
    """Colour of patches that are `scale` times the size of a base patch."""
    return SCALE_COLOURS[min(scale.bit_length(), len(SCALE_COLOURS)) - 1]


def _figure(photo: PhotoResult, patch_size: int) -> str:
    height, width = photo.picture.shape[:2]
    name = escape(photo.name)
    plain = to_data_uri(Image.fromarray(photo.picture), quality=90)
    drawn = to_data_uri(draw_patches(photo.picture, photo.patches, patch_size))
    size = f'width="{width}" height="{height}"'
    tokens = f"{photo.tokens} of {photo.tokens_uniform} tokens"
    answer = "" if photo.prediction is None else f'<span class="answer">{escape(photo.prediction)}</span>'
    if photo.agrees is not None:
        kind, words = ("same", "same top-1") if photo.agrees else ("other", "other top-1")
        answer += f'<span class="badge {kind}">{words}</span>'
    share = photo.tokens / photo.tokens_uniform
    return (
        f'<figure><label><input type="checkbox" aria-label="Hide the patches of {name}">'
        f'<img class="plain" src="{plain}" {size} alt="{name}">'
        f'<img class="drawn" src="{drawn}" {size} alt="{name} with its patches, {tokens}"></label>'
        f'<figcaption><b title="{name}">{escape(Path(photo.name).name)}</b>'
        f'<span class="meter"><i style="width:{share:.1%}"></i></span>'
        f"<span>{tokens} ({_percent(share)})</span><span>{answer}</span></figcaption></figure>"
    )


def _skipped_section(skipped: list[str]) -> str:
    if not skipped:
        return ""
    items = "".join(f"<li>{escape(message)}</li>" for message in skipped)
    return f'<section><h2>Skipped files</h2><ul class="skipped">{items}</ul></section>'


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _percent(share: float) -> str:
    if 0.99 < share < 1:  # what is not quite all must not be rounded to all
        return f"{math.floor(1000 * share) / 10:.1f} %"
    return f"{100 * share:.0f} %"


def _number(value: float) -> str:
    """Three significant digits, but never fewer than the whole number has."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
