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
import torch
from PIL import Image
from rich.console import Console
from skimage import data

from aptvit.patching.explanation import merge_decisions
from aptvit.patching.patchifier import Patchifier
from aptvit.report.page import Comparison, ImageResult, summary_table, write_report
from aptvit.report.why import as_json

KEYS = {  # what programs may read of `aptvit compare --json`
    *("model", "weights", "device", "dtype", "scorer", "budget", "thresholds", "image_sizes", "patch_size"),
    *("batch_size", "num_photos", "photos_per_round", "keep_ratio", "keep_spread", "gflops_uniform"),
    *("gflops_adaptive", "seconds_uniform", "seconds_adaptive", "agreement", "top1_uniform", "top1_adaptive"),
    *("likeness", "likeness_of", "has_size_option", "cosine"),
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
        image_sizes=[(224, 224)],
        tokens_uniform=196,
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
    assert read["photos"] == [photo | {"likeness": None, "prediction_uniform": None, "truth": None}]


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
    for sign in ("http:", "https:", "<script src", "<link", "@import", "url("):
        assert sign not in html
    assert "prefers-color-scheme: dark" in html
    assert any(meta.get("name") == "viewport" for meta in read.all("meta"))
    assert read.all("html") == [{"lang": "en"}]


@pytest.mark.parametrize("budget", [{"thresholds": (5.0, 5.5)}, {"keep": 0.4}])
def test_page_says_why_patches_are_merged(budget: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    image = torch.from_numpy(data.astronaut()[:104, 100:244].copy()).permute(2, 0, 1)  # (3, 104, 144)
    patchifier = Patchifier(8, scales=3, **budget)
    layout = patchifier(patchifier.groups([image]))
    decisions = merge_decisions(patchifier, image)
    pixels = image.permute(1, 2, 0).numpy()
    astronaut = photo(image=pixels, patches=layout.patches(0).numpy(), decisions=decisions)
    page = browser.new_page(viewport={"width": 390, "height": 800})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(write_report(comparison(patch_size=8, results=[photo(), astronaut]), tmp_path).as_uri())
    cut = page.locator(".cut").nth(1)
    box = cut.bounding_box()
    seen = set()
    for top, left, size in layout.patches(0).tolist()[::7]:
        x, y = left + size // 2, top + size // 2
        cut.click(position={"x": (x + 0.5) * box["width"] / 144, "y": (y + 0.5) * box["height"] / 104})
        words, explanation = page.locator(".why").nth(1).inner_text(), decisions.at(x, y)
        assert f"{size} \N{MULTIPLICATION SIGN} {size} pixels, at ({left}, {top})" in words
        assert ("Why was this patch merged?" in words) == (size > 8)
        for candidate in explanation.candidates:
            (line,) = (line for line in words.splitlines() if line.startswith(f"{candidate.size} px: "))
            if candidate.score is not None:
                assert float(line.split("score ")[1].split(",")[0]) == pytest.approx(candidate.score, rel=1e-3)
                assert f"{'threshold' if 'thresholds' in budget else 'cut'} {candidate.limit:.4g};" in line
            assert ("this patch: " in line) == (candidate.size == size)
            assert (line.endswith("part of the patch above")) == (candidate.size < size)
            assert ("not merged: " in line) == (candidate.score is not None and candidate.size > size)
        frame = page.locator(".frame").nth(1).bounding_box()
        assert frame["width"] * 144 / box["width"] == pytest.approx(size, abs=0.1)
        assert (frame["x"] - box["x"]) * 144 / box["width"] == pytest.approx(left, abs=0.1)
        seen.add(size)
    assert seen == {8, 16, 32}
    cut.press("ArrowLeft")
    assert f"at ({left}, {top})" not in page.locator(".why").nth(1).inner_text()
    page.locator(".cut").first.click()  # of an image without explanations
    assert page.locator(".why").first.inner_text() == "" and complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


def test_merges_among_equal_scores_are_not_said_to_be_below_the_cut() -> None:
    image = torch.full((3, 64, 64), 128, dtype=torch.uint8)  # every candidate scores 0, and so does the cut
    lines = json.loads(as_json(merge_decisions(Patchifier(8, scales=2, keep=0.6), image)))["lines"][0]
    ends = [line.rsplit("; ", 1)[1] for row in lines for line in row]
    equal = "this patch: equal to the cut, and the first of those"
    assert set(ends) == {equal, "not merged: its score is not below the cut"}
    assert ends.count(equal) == 9  # of 64 tokens three each, down to 37


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
    assert "5 of 8 tokens (62 %) both tabby cat same top-1" in words
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seconds_adaptive": (8.0, 12.0, 10.0)}, ("not faster", "--img-size 448", "--batch-size 32", "--keep 0.35")),
        ({"agreement": 0.5}, ("aptvit heal", "--keep 0.65", "--methods apt-entropy,downscale")),
        ({"top1_uniform": 0.8, "top1_adaptive": 0.7}, ("aptvit heal",)),
        ({"top1_uniform": 0.8, "top1_adaptive": 0.8}, ()),
        ({"agreement": None, "weights": "random"}, ()),
    ],
)
def test_a_loss_names_what_to_try_next(tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    on_page, in_terminal = (
        page(comparison(**changes), tmp_path).words,
        " ".join(terminal(comparison(**changes)).split()),
    )
    for word in words:
        assert word in on_page and word in in_terminal
    assert ("To try next" in on_page) == ("next:" in in_terminal) == bool(words)


def test_cards_say_what_both_models_answered(tmp_path: Path) -> None:
    differing = photo(agrees=False, prediction="lynx", prediction_uniform="tabby cat", truth="tabby cat")
    words = " ".join(page(comparison(results=[differing]), tmp_path).words.split())
    assert "adaptive lynx uniform tabby cat label tabby cat other top-1" in words
    words = " ".join(page(comparison(results=[photo(prediction_uniform="tabby cat")]), tmp_path).words.split())
    assert (
        "both tabby cat same top-1" in words and "label" not in words.split("Where the patches went")[1].split("Run")[0]
    )


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
