from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from aptvit.report.page import Comparison, ImageResult, summary_table, write_report

KEYS = {  # what programs may read of `aptvit compare --json`
    *("model", "weights", "device", "dtype", "scorer", "budget", "thresholds", "image_size", "patch_size"),
    *("batch_size", "num_photos", "photos_per_round", "keep_ratio", "keep_spread", "gflops_uniform"),
    *("gflops_adaptive", "seconds_uniform", "seconds_adaptive", "agreement", "top1_uniform", "top1_adaptive"),
    *("correlation", "cosine"),
    *("photos", "skipped", "environment", "command", "tokens_uniform", "tokens_adaptive", "throughput_uniform"),
    *("throughput_adaptive", "speedup", "speedup_range", "flop_ratio", "eta"),
}
PATCHES = np.array([(0, 0, 32), (0, 32, 16), (0, 48, 16), (16, 32, 16), (16, 48, 16)])


def photo(name: str = "cat.jpg", **changes: Any) -> ImageResult:
    image = np.full((32, 64, 3), 77, dtype=np.uint8)
    result = ImageResult(name, PATCHES, image, tokens=5, tokens_uniform=8, agrees=True, prediction="tabby cat")
    return replace(result, **changes)


def comparison(**changes: Any) -> Comparison:
    result = Comparison(
        model="vit_small",
        weights="pretrained",
        device="cpu",
        dtype="float32",
        scorer="entropy",
        budget="half of the patch tokens",
        thresholds=(5.5, 4.25),
        image_size=(224, 224),
        patch_size=16,
        batch_size=8,
        keep_ratio=0.5,
        keep_spread=(0.25, 0.75),
        gflops_uniform=9.0,
        gflops_adaptive=3.6,
        seconds_uniform=(4.0, 6.0, 5.0),
        seconds_adaptive=(2.0, 2.0, 2.5),
        images=100,
        agreement=0.95,
        results=[photo()],
    )
    return replace(result, **changes)


def terminal(c: Comparison, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(summary_table(c))
    return capture.get()


class Page(HTMLParser):
    """Tags, attributes and visible words of a page, and whether its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if "style" not in self.open:
            self.words += f" {text}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(c: Comparison, tmp_path: Path) -> Page:
    return Page(write_report(c, tmp_path).read_text(encoding="utf-8"))


# Numbers


def test_derived_numbers() -> None:
    c = comparison()
    assert c.tokens_uniform == 196
    assert c.tokens_adaptive == 98
    assert (c.throughput_uniform, c.throughput_adaptive, c.speedup.median) == (20.0, 50.0, 2.0)


def test_to_dict_is_json_with_the_derived_numbers() -> None:
    c = comparison(keep_ratio=np.float64(0.5), images=np.int64(100), cosine=np.float32(0.5))
    read = json.loads(json.dumps(c.to_dict()))
    assert read["speedup"] == 2.0
    assert read["speedup_range"] == [2.0, 3.0]
    assert read["eta"] == pytest.approx(0.8)
    assert read["throughput_adaptive"] == 50.0
    assert (read["num_photos"], read["photos_per_round"]) == (100, 100)
    assert set(read) == KEYS
    assert read["thresholds"] == [5.5, 4.25]
    photo = {"name": "cat.jpg", "tokens": 5, "tokens_uniform": 8, "agrees": True, "prediction": "tabby cat"}
    assert read["photos"] == [photo | {"correlation": None}]


# The table in the terminal


def test_summary_table_shows_both_models() -> None:
    text = terminal(comparison())
    for label, uniform, adaptive in [
        ("patch tokens", "196", "98"),
        ("GFLOPs", "9", "3.6"),
        ("milliseconds", "50", "20"),
        ("images/s", "20", "50"),
    ]:
        assert re.search(rf"{label}\W+{re.escape(uniform)}\W+{re.escape(adaptive)}\W", text)
    assert "patch tokens kept: 50 % (25 % to 75 % from photo to photo)" in text
    assert "speed-up: 2.00\N{MULTIPLICATION SIGN} (2.00 to 3.00 over 3 rounds)" in text
    assert "FLOP ratio: 2.50\N{MULTIPLICATION SIGN}" in text
    assert "eta: 0.80 (share of the saved FLOPs that became saved time)" in text
    assert "same top-1 as uniform: 95 % (of 100 photos)" in text
    assert "random" not in text


def test_summary_table_does_not_judge_random_weights() -> None:
    text = terminal(comparison(weights="random", agreement=None))
    assert "same top-1 as uniform: n/a (the weights are random, so agreement is not shown)" in text


def test_summary_table_shows_accuracy_and_cosine_where_known() -> None:
    assert "accuracy" not in terminal(comparison())
    text = terminal(comparison(top1_uniform=0.851, top1_adaptive=0.8475, cosine=0.98765))
    assert "top-1 accuracy: 84.75 % (85.10 % uniform)" in text
    assert "cosine: 0.9877 (between the outputs of the two models)" in text


def test_summary_table_takes_names_literally_and_fits_narrow_terminals() -> None:
    text = terminal(comparison(model="[red]x[/red]"), width=50)
    assert "[red]x[/red]" in text
    assert max(map(len, text.splitlines())) <= 50


@pytest.mark.parametrize(("share", "shown"), [(0.999, "99.9 %"), (0.9999, "99.9 %"), (1.0, "100 %"), (0.95, "95 %")])
def test_nearly_all_is_not_shown_as_all(share: float, shown: str) -> None:
    assert f"same top-1 as uniform: {shown} (of" in terminal(comparison(agreement=share))


# The page


def test_page_is_self_contained(tmp_path: Path) -> None:
    path = write_report(comparison(), tmp_path / "new" / "report")
    assert path == tmp_path / "new" / "report" / "index.html"
    html = path.read_text(encoding="utf-8")
    read = Page(html)
    assert {image["src"].split(",")[0] for image in read.all("img") if image["src"]} == {"data:image/jpeg;base64"}
    for sign in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert sign not in html
    assert "prefers-color-scheme: dark" in html
    assert any(meta.get("name") == "viewport" for meta in read.all("meta"))
    assert read.all("html") == [{"lang": "en"}]


def test_page_says_what_came_out(tmp_path: Path) -> None:
    environment = {"torch": "2.15", "machine": "a desk"}
    c = comparison(environment=environment, command="aptvit compare 'my photos' && true", skipped=["a.jpg: empty"])
    words = " ".join(page(c, tmp_path).words.split())
    assert (
        "50 % of the patch tokens, 2.0\N{MULTIPLICATION SIGN} faster than the uniform model, "
        "and the same answer on 95 % of the photos." in words
    )
    for part in ("25 % to 75 %", "0.80 eta", "vit_small", "entropy", "5.5, 4.25", "torch 2.15", "machine a desk"):
        assert part in words
    assert "aptvit compare 'my photos' && true" in words
    assert "Skipped files a.jpg: empty" in words
    assert "5 of 8 tokens (62 %) tabby cat same top-1" in words
    assert "1 of 100 photos" in words


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seconds_adaptive": (8.0, 12.0, 10.0)}, "2.0\N{MULTIPLICATION SIGN} slower than the uniform model"),
        ({"seconds_adaptive": (4.0, 6.0, 5.0)}, "as fast as the uniform model"),
        ({"agreement": None}, "faster than the uniform model."),
        ({"images": 1, "agreement": 0.0}, "and another answer."),
        ({"images": 1, "agreement": 1.0}, "and the same answer."),
    ],
)
def test_the_sentence_is_honest(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    assert sentence in page(comparison(**changes), tmp_path).words


def test_page_with_random_weights_shows_no_agreement(tmp_path: Path) -> None:
    c = comparison(weights="random", agreement=None, results=[photo(agrees=None, prediction=None)])
    words = page(c, tmp_path).words
    assert "weights are random" in words
    assert "other top-1" not in words
    assert "same answer" not in words


def test_page_shows_each_photo_drawn_and_plain(tmp_path: Path) -> None:
    c = comparison(results=[photo("a.jpg"), photo("b.jpg", agrees=False)])
    read = page(c, tmp_path)
    images = read.all("img")
    assert [image["alt"] for image in images] == [
        "a.jpg",
        "a.jpg with its patches, 5 of 8 tokens",
        "b.jpg",
        "b.jpg with its patches, 5 of 8 tokens",
    ]
    plain, drawn = (
        Image.open(io.BytesIO(base64.b64decode(str(image["src"]).split(",")[1]))).convert("RGB") for image in images[:2]
    )
    assert plain.size == (64, 32)
    assert np.abs(np.asarray(plain).astype(int) - 77).max() <= 2
    assert drawn.size == (768, 384)
    assert "other top-1" in read.words
    assert "16 pixels" in read.words
    assert "32 pixels" in read.words
    assert "64 pixels" not in read.words


def test_page_without_photos_has_no_photo_section(tmp_path: Path) -> None:
    read = page(comparison(results=[]), tmp_path)
    assert not read.all("figure")
    assert "Where the patches went" not in read.words
    assert "Skipped" not in read.words


def test_page_escapes_what_comes_from_outside(tmp_path: Path) -> None:
    nasty = "<b>&\"'$model.jpg"
    c = comparison(
        model=nasty,
        command=nasty,
        skipped=[nasty],
        environment={nasty: nasty},
        results=[photo(f"folder/{nasty}", prediction=nasty)],
    )
    read = page(c, tmp_path)
    assert [b["title"] for b in read.all("b")] == [f"folder/{nasty}"]
    assert read.all("img")[0]["alt"] == f"folder/{nasty}"
    assert read.words.count(nasty) == 9


def test_file_names_that_are_not_text_can_be_shown(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert "caf?.jpg" in page(comparison(results=[photo(name)]), tmp_path).words


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write a report to .*file .*choose another folder"):
        write_report(comparison(), tmp_path / "file")
