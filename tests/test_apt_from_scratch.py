"""The method of the paper in 150 lines, which know nothing of the library: both must agree on the same images."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aptvit

EXAMPLE = Path(__file__).parents[1] / "examples" / "apt_from_scratch.py"


@pytest.fixture(scope="module")
def scratch() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("apt_from_scratch", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def host(make_host: Callable[..., Any]) -> Any:
    return make_host(depth=3)


@pytest.fixture(params=["batch", "sizes"])
def pixels(request: pytest.FixtureRequest, photo_batch: Tensor, photos: list[Tensor]) -> Tensor | list[Tensor]:
    """Raw pixels of real photos: a batch of one size, and a list of sizes that are not the host's own."""
    if request.param == "batch":
        return photo_batch
    sizes = [(128, 192), (256, 64), (192, 192), (128, 192), (64, 64)]
    return [photo[:, :height, -width:] for photo, (height, width) in zip(photos, sizes, strict=True)]


def trained(model: aptvit.AdaptivePatchTransformer) -> aptvit.AdaptivePatchTransformer:
    """The model, as if the sub-patches of large patches had been learned."""
    for parameter in model.coarse_embed.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return model


def rewritten(scratch: ModuleType, host: Any, model: aptvit.AdaptivePatchTransformer) -> Any:
    """The example's model with the parameters of the library's."""
    plain = scratch.AdaptivePatchTransformer(host, model.thresholds)
    plain.conv.load_state_dict(model.coarse_embed.conv.state_dict())
    plain.linear.load_state_dict(model.coarse_embed.linear.state_dict())
    return plain.eval()


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("thresholds", [(6.0,), (6.2, 6.6), (5.5, 6.5)])
def test_library_does_the_same(
    scratch: ModuleType, host: Any, pixels: Tensor | list[Tensor], thresholds: tuple[float, ...]
) -> None:
    model = trained(aptvit.adapt(host, thresholds=thresholds))
    plain = rewritten(scratch, host, model)
    layout = model.layout(pixels)
    # Every scale occurs, and numbers of tokens differ.
    assert all(sum(numbers) for numbers in zip(*layout.counts, strict=True))
    assert len(set(layout.seqlens)) > 2
    with torch.inference_mode():
        assert [len(plain.tokens(image)) for image in pixels] == layout.seqlens
        for image, (rows, cols), expected in zip(pixels, layout.grid_sizes, layout.scale_map, strict=True):
            assert torch.equal(scratch.choose_scales(image, 16, thresholds), expected[:rows, :cols].long())
        logits = plain(pixels)
        assert_close(model(pixels), logits)
        # The branch of sub-patches matters, so it is compared too.
        without = scratch.AdaptivePatchTransformer(host, thresholds).eval()(pixels)
        assert (without - logits).abs().max() > 0.01 * logits.abs().max()
        assert_close(aptvit.adapt(host, thresholds=thresholds)(pixels), without)


def test_scores_are_those_of_equation_1(scratch: ModuleType, host: Any, photo_batch: Tensor) -> None:
    ((_, scores),) = aptvit.adapt(host, thresholds=(6.0, 6.0)).scores(photo_batch)
    for factor, expected in scores.items():
        for photo, bits in zip(photo_batch.float(), expected, strict=True):
            gray = 0.2989 * photo[0] + 0.5870 * photo[1] + 0.1140 * photo[2]
            # A gray value at the edge of two bins may be rounded to either: one pixel of 1024 is some 0.002 bits.
            torch.testing.assert_close(bits, scratch.entropy(gray, 16 * factor), rtol=0, atol=5e-3)


@pytest.mark.parametrize("thresholds", [(), (-1.0,), (-1.0, -1.0)])
def test_host_itself_where_nothing_is_merged(
    scratch: ModuleType, host: Any, photo_batch: Tensor, images: Tensor, thresholds: tuple[float, ...]
) -> None:
    plain = scratch.AdaptivePatchTransformer(host, thresholds).eval()
    with torch.inference_mode():
        assert_close(plain(photo_batch), host(images))


def test_only_large_patches(scratch: ModuleType, host: Any, photo_batch: Tensor) -> None:
    model = trained(aptvit.adapt(host, thresholds=(0.0, 10.0)))
    plain = rewritten(scratch, host, model)
    with torch.inference_mode():
        assert [len(plain.tokens(photo)) for photo in photo_batch] == [1 + 4] * len(photo_batch)
        assert_close(model(photo_batch), plain(photo_batch))


def test_sides_must_be_whole_patches(scratch: ModuleType, host: Any) -> None:
    with pytest.raises(ValueError, match=r"\(64, 96\) are not multiples of 64"):
        scratch.AdaptivePatchTransformer(host, (5.0, 5.0))([torch.zeros(3, 64, 96, dtype=torch.uint8)])


def test_script_runs(scratch: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    scratch.main()
    printed = capsys.readouterr().out
    assert "astronaut: " in printed and "of 576 patch tokens" in printed and "weights are random" in printed


def test_it_is_short_and_stands_alone() -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 150
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    packages = {name.split(".")[0] for name in names}
    assert packages == {"__future__", "collections", "math", "skimage", "timm", "torch"}
