from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

torch.set_num_threads(1)

_LONGEST = ("test_kill.py", "test_processes.py", "test_dense.py", "test_distributed.py", "test_bulk.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that no worker begins one when the other is done."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _skip_libraries_in_garbage_collection() -> None:
    """Takes the objects of imported libraries out of full collections, which take seconds with them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of timm's smallest ViT (160 pixels, patches of 16), with ten classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def photos() -> list[Tensor]:
    """Real photos, (3, H, W) uint8 of different sizes."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [data.astronaut(), data.coffee(), data.chelsea(), *load_sample_images().images]
    return [torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous() for array in arrays]


@pytest.fixture(scope="session")
def photo_batch(photos: list[Tensor]) -> Tensor:
    """(5, 3, 128, 128) uint8: real photos, reduced and cropped."""
    crops = []
    for photo in photos:
        side = min(photo.shape[1:])
        square = photo[None, :, :side, :side].float()
        crops.append(torch.nn.functional.interpolate(square, size=(128, 128), mode="area").round().byte())
    return torch.cat(crops)


@pytest.fixture(scope="session")
def crops(photos: list[Tensor]) -> Tensor:
    """(40, 3, 128, 128) uint8 crops of real photos."""
    found = []
    for number, photo in enumerate(photos):
        for i in range(8):
            y, x = (17 * i + 5 * number) % (photo.shape[1] - 128), (29 * i) % (photo.shape[2] - 128)
            found.append(photo[:, y : y + 128, x : x + 128])
    return torch.stack(found)


@pytest.fixture(scope="session")
def images(photo_batch: Tensor) -> Tensor:
    """The photos, normalised with mean and standard deviation 0.5."""
    return (photo_batch.float() / 255 - 0.5) / 0.5


@pytest.fixture
def make_host() -> Callable[..., Any]:
    """Builds a ViT of two blocks for 128 x 128 pixels, with no parameter that is zero, one or tiny."""

    def make(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
        host = timm.create_model(name, **{"depth": 2, "img_size": 128, "num_classes": 10, **options}).eval()
        with torch.no_grad():
            for parameter_name, parameter in host.named_parameters():
                if parameter.ndim == 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in parameter_name))
                elif "_token" in parameter_name or "pos_embed" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.5)
                elif "freqs" not in parameter_name:
                    torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        return host

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium, where there is one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()
