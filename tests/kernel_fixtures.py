from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, name, types, constants, options = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module(module), name)
signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
constexprs = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
assert compiled.asm["cubin"]
"""


@pytest.fixture(scope="module")
def triton_device() -> Iterator[str]:
    """Where the kernels run: compiled on a GPU, else interpreted on the CPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield "cuda"
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        # A function decides when it is made whether it is to be interpreted. timm imports Triton, so that those of
        # Triton's own library were made before the variable was set.
        for module in (tl, tl.standard):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, InterpretedFunction(value.fn))
        yield "cpu"


def _made_again(name: str) -> Iterator[ModuleType]:
    """The module with its kernels as they are to run here, and no trace of it afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name)
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def entropy_triton(triton_device: str) -> Iterator[ModuleType]:
    yield from _made_again("aptvit.patching.kernels.entropy_triton")


@pytest.fixture(scope="module")
def gather_triton(triton_device: str) -> Iterator[ModuleType]:
    yield from _made_again("aptvit.layers.kernels.gather_triton")


@pytest.fixture
def compile_for_gpu(tmp_path: Path) -> Callable[..., None]:
    """Compiles a kernel for a GPU that need not be here, in a process that interprets nothing."""
    pytest.importorskip("triton")

    def compile(module: str, kernel: str, types: dict[str, str], constants: dict[str, Any], **options: Any) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        request = json.dumps([module, kernel, types, constants, options])
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, request],
            env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    return compile


def _draw_images(
    data: st.DataObject,
    shape: Sequence[int],
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.uint8, torch.float32, torch.bfloat16),
) -> Tensor:
    """Images of this shape in one of several types and layouts, floats about 0 with deviation 1."""
    batch, channels, height, width = shape
    dtype = data.draw(st.sampled_from(dtypes))
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced", "expanded"]))
    coarseness = data.draw(st.sampled_from([1, 16, 128]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def draw(*shape: int) -> Tensor:
        pixels = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8) // coarseness * coarseness
        return (pixels if dtype == torch.uint8 else (pixels.float() - 128) / 64).to(device, dtype)

    if layout == "channels_last":
        return draw(*shape).to(memory_format=torch.channels_last)
    if layout == "transposed":
        return draw(batch, channels, width, height).transpose(2, 3)
    if layout == "sliced":
        return draw(batch + 1, channels, 2 * height, width + 3)[1:, :, ::2, 3:]
    if layout == "expanded":
        return draw(1, channels, height, width).expand(*shape)
    return draw(*shape)


@pytest.fixture(scope="session")
def draw_images() -> Callable[..., Tensor]:
    return _draw_images


def _entropy_by_numpy(
    images: Tensor, weights: Sequence[float], offset: float, step: float, side: int, bins: int
) -> np.ndarray:
    x = images.float().cpu().numpy()
    gray = np.float32(weights[0]) * x[:, 0]
    for channel in range(1, len(weights)):
        gray = gray + np.float32(weights[channel]) * x[:, channel]
    level = np.clip(((gray + np.float32(offset)) * np.float32(step)).astype(np.int32), 0, bins - 1)
    scores = np.zeros((len(x), x.shape[2] // side, x.shape[3] // side))
    for b, y, x_ in np.ndindex(scores.shape):
        patch = level[b, y * side : (y + 1) * side, x_ * side : (x_ + 1) * side]
        p = np.bincount(patch.ravel(), minlength=bins) / side**2
        scores[b, y, x_] = -(p[p > 0] * np.log2(p[p > 0])).sum()
    return scores


@pytest.fixture(scope="session")
def entropy_by_numpy() -> Callable[..., np.ndarray]:
    """Entropy of every patch by itself."""
    return _entropy_by_numpy


@pytest.fixture(scope="session")
def check_entropy(entropy_by_numpy: Callable[..., np.ndarray]) -> Callable[..., None]:
    """Compares a twin with the formula on images of random sizes, types and layouts."""

    def check(entropy_maps: Callable[..., dict[int, Tensor]], data: st.DataObject, device: str) -> None:
        patch = data.draw(st.sampled_from([3, 7, 14, 16, 28]))
        factors = data.draw(st.sampled_from([[2], [2, 4], [4], [2, 4, 8], [2, 8]]))
        # up to five of the finest cells along a side, and pixels that no cell holds
        height, width = (data.draw(st.integers(1, 5 * min(factors) * patch + patch)) for _ in range(2))
        channels = data.draw(st.sampled_from([1, 3, 4]))
        images = _draw_images(data, (data.draw(st.integers(1, 3)), channels, height, width), device)
        if images.dtype == torch.uint8:
            gray = ((2989.0, 5870.0, 1140.0), 0.5, 512 / 2550000) if channels == 3 else ((1.0,), 0.0, 512 / 255)
        elif channels == 3:
            gray = ((0.2989 * 64, 0.5870 * 64, 0.1140 * 64), 128.0, 512 / 255)
        else:
            gray = ((64.0,), 128.0, 512 / 255)
        bins = data.draw(st.sampled_from([512, 300, 10]))
        maps = entropy_maps(images, *gray, patch, factors, bins)
        assert sorted(maps) == sorted(factors)
        for factor, scores in maps.items():
            expected = entropy_by_numpy(images, *gray, factor * patch, bins)
            assert scores.dtype == torch.float32 and scores.shape == expected.shape
            np.testing.assert_allclose(scores.cpu().numpy(), expected, atol=1e-5, rtol=0)

    return check
