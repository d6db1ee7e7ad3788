"""An answer depends on the image, the weights and the settings, and on nothing else: docs/explain/determinism.md."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import aptvit

OPTIONS: dict[str, dict[str, Any]] = {
    "share": {"keep": 0.6, "scales": 3},
    "thresholds": {"thresholds": (6.0, 6.5)},
    "laplacian, bucket": {"scorer": "laplacian", "keep": 0.6, "token_bucket": 32},
    "windows": {"scorer": "upsample", "keep": 0.6, "window_size": 4, "global_blocks": [1]},
    "embedding": {"scorer": "embedding", "keep": 0.6},
    "preview": {"scorer": "preview", "keep": 0.6},
}

PROCESS = """
import hashlib, timm, torch, aptvit
torch.manual_seed(0)
torch.set_num_threads(1)
host = timm.create_model("test_vit", img_size=128).eval()
images = torch.rand(4, 3, 128, 128)
images[:, :, :64] *= 0.01
with torch.no_grad():
    logits = aptvit.adapt(host, keep=0.6)(images)
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def batch(crops: Tensor) -> Tensor:
    return (crops[::5].float() / 255 - 0.5) / 0.5


def assert_equal_to_rounding(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_other_images_of_the_batch(make_host: Callable[..., Any], batch: Tensor, kind: str) -> None:
    model = aptvit.adapt(make_host(), **OPTIONS[kind])
    layout, logits = model.layout(batch), model(batch)
    reverse = model(batch.flip(0)).flip(0)
    assert_equal_to_rounding(reverse, logits)
    for number, image in enumerate(batch):
        assert model.layout(image[None]).counts == [layout.counts[number]]
        assert_equal_to_rounding(model(image[None])[0], logits[number])


@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_number_of_threads(make_host: Callable[..., Any], batch: Tensor, kind: str, _threads: None) -> None:
    model = aptvit.adapt(make_host(), **OPTIONS[kind])
    torch.set_num_threads(1)
    counts, logits = model.layout(batch).counts, model(batch)
    torch.set_num_threads(3)
    assert model.layout(batch).counts == counts
    assert_equal_to_rounding(model(batch), logits)


@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_calls_repeat_bit_for_bit(make_host: Callable[..., Any], batch: Tensor, kind: str) -> None:
    model = aptvit.adapt(make_host(), **OPTIONS[kind])
    first = model(batch)
    model(batch[:3, :, :64])  # other sizes in between
    assert torch.equal(model(batch), first)
    model.train().eval()  # nothing is kept from before
    assert torch.equal(model(batch), first)


def test_runs_repeat_bit_for_bit() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    digests = [run.communicate()[0].strip() for run in runs]
    assert digests[0] == digests[1] and len(digests[0]) == hashlib.sha256().digest_size * 2
