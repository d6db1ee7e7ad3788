"""The demo page in a real browser: uploads, sliders, and the numbers that follow them."""

from __future__ import annotations

import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")

from models.around_hosts import make

from aptvit.demo.demo_model import DemoModel
from aptvit.demo.guard import MAX_UPLOAD_BYTES
from aptvit.demo.page import _quarter, _range
from aptvit.demo.server import serve
from aptvit.files.sample_photos import write_sample_photos

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model(NAME).state_dict(), weights)
    folder, before = tmp_path_factory.mktemp("temporary"), tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        with serve(DemoModel(NAME, weights)) as address:
            yield address
        assert not list(folder.glob("*aptvit-*"))  # nothing is kept
    finally:
        tempfile.tempdir = before


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page with its first photo. Fails if the browser reports errors or requests anything from other machines."""
    yield from _opened(browser, address)


def _opened(browser: Any, address: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: problems.append(request.url) if _is_external(request.url, address) else None)
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("#speedup")
    yield page
    page.close()
    assert problems == []


def _is_external(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def _number(page: Any, name: str) -> float:
    return float(re.findall(r"[\d.]+", page.inner_text(f"#{name}"))[0])


def _changes(page: Any, name: str, before: str) -> None:
    page.wait_for_function(
        "([name, before]) => document.getElementById(name)?.innerText !== before", arg=[name, before]
    )


def test_numbers_follow_sliders_and_uploads(page: Any, tmp_path: Path) -> None:
    assert _number(page, "tokens") == 97  # half of 196, in steps of three
    before = page.inner_text("#tokens")
    page.locator("#keep input[type=range]").fill("0.3")
    _changes(page, "tokens", before)
    page.wait_for_selector("#times:not(:has(.aptvit-outdated)) #speedup")  # measured again
    assert _number(page, "tokens") == 58 and "keep=0.3, scales=3" in page.inner_text("#code")
    before = page.inner_text("#tokens")
    page.get_by_label("thresholds").check()
    _changes(page, "tokens", before)
    assert "thresholds=(5.5, 4)" in page.inner_text("#code")
    page.wait_for_selector("#threshold2 input[type=range]")
    assert not page.locator("#threshold3 input[type=range]").is_visible()
    before = page.inner_text("#tokens")
    flat = tmp_path / "flat.png"
    Image.fromarray(np.full((300, 300, 3), 90, dtype=np.uint8)).save(flat)
    page.set_input_files("#photo input[type=file]", flat)
    _changes(page, "tokens", before)
    assert _number(page, "tokens") == 9 + 4 * 3 + 1  # all merged as far as 14 x 14 patches can be
    assert "football" not in page.inner_text("#top") and page.inner_text("#top").count("%") == 10


def test_a_depth_model_shows_both_maps(browser: Any, tmp_path: Path) -> None:
    """Fewer tokens, and the likeness of the two maps that the model has in Python."""
    make("depth_anything").host.save_pretrained(tmp_path)
    transformers.DPTImageProcessor(size={"height": 112, "width": 112}).save_pretrained(tmp_path)
    model = DemoModel(str(tmp_path))
    with serve(model) as address:
        for page in _opened(browser, address):
            assert _number(page, "tokens") < 64 and page.locator(".aptvit-answers img").count() == 3
            photo = model.read(write_sample_photos(tmp_path / "photos")[0])
            likeness = model.predict(photo, model.settings()).likeness
            assert likeness is not None and _number(page, "likeness") == pytest.approx(likeness[1], abs=2e-3)
            assert "map" in page.inner_text("#likeness + span")


def test_on_a_phone(page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    before = page.inner_text("#tokens")
    page.locator("#keep input[type=range]").fill("0.7")
    _changes(page, "tokens", before)
    page.wait_for_selector("#patches img")
    box = page.locator("#patches img").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390
    with page.expect_download() as taken:
        page.locator("#patches").get_by_label("Download").first.click()
    assert Image.open(taken.value.path()).size == (896, 896)
    huge = tmp_path / "huge.png"
    Image.fromarray(np.zeros((8000, 8000), dtype=np.uint8)).save(huge)
    page.set_input_files("#photo input[type=file]", huge)
    page.get_by_text("huge.png: 8000 x 8000 pixels are more than").first.wait_for()


def test_files_that_are_too_large(page: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.bmp"
    large.write_bytes(bytes(MAX_UPLOAD_BYTES + 1))
    page.set_input_files("#photo input[type=file]", large)
    page.get_by_text("maximum allowed size").first.wait_for()


@pytest.mark.parametrize(("name", "reason"), [("text.jpg", "not an image"), ("cut.png", "cannot be decoded")])
def test_an_upload_that_cannot_be_read_is_named_without_its_folder(
    page: Any, tmp_path: Path, name: str, reason: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / name).write_bytes((tmp_path / "whole.png").read_bytes()[:9000] if name == "cut.png" else b"no image")
    page.set_input_files("#photo input[type=file]", tmp_path / name)
    page.get_by_text(f"{name}: {reason}").first.wait_for()
    page.get_by_text("Drop a photo, take one").first.wait_for()
    (message,) = page.locator(".toast-body").all_inner_texts()
    assert message.count(name) == 1 and "/" not in message


def test_ranges_of_sliders_are_round_numbers() -> None:
    for largest, limits in (
        (59.98848342895508, (60.0, 0.5)),
        (9.0, (9.0, 0.05)),
        (0.0312345, (0.0315, 0.0005)),
        (1234.5, (1250.0, 50.0)),
        (0.0, (1.0, 0.05)),
    ):
        assert tuple(_range(largest).values()) == limits
        assert _range(largest)["maximum"] >= largest and len(str(_quarter(*limits))) <= 7


def test_only_this_machine_can_open_the_page(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    addresses = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    for other in addresses - {"127.0.0.1"}:
        with pytest.raises(OSError), socket.create_connection((other, port), timeout=2):
            pass


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        model = DemoModel(NAME, None)
        with pytest.raises(ValueError, match="choose another --port"), serve(model, port=taken.getsockname()[1]):
            pass
