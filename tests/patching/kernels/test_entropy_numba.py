from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aptvit.patching import kernels
from aptvit.patching.kernels import entropy_numba
from aptvit.patching.kernels.entropy_numba import entropy_maps

numba = pytest.importorskip("numba")

GRAY = ((2989.0, 5870.0, 1140.0), 0.5, 512 / 2550000)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    numba.get_num_threads()  # starts numba's threads, which may change torch's number
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_entropy_is_that_of_the_formula(check_entropy: Callable[..., None], data: st.DataObject) -> None:
    check_entropy(entropy_maps, data, "cpu")


def test_photos_fall_on_the_same_side_of_a_threshold(
    entropy_by_numpy: Callable[..., np.ndarray], photo_batch: Tensor, threads: int
) -> None:
    maps = entropy_maps(photo_batch, *GRAY, 16, [2, 4], 512)
    assert torch.get_num_threads() == threads
    for factor, scores in maps.items():
        expected = entropy_by_numpy(photo_batch, *GRAY, 16 * factor, 512)
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)
        for threshold in (5.0, 5.5, 6.0, 6.5):
            np.testing.assert_array_equal(scores.numpy() < threshold, expected < threshold)


def test_a_patch_of_one_value_has_no_entropy() -> None:
    images = torch.full((1, 1, 60, 60), 9, dtype=torch.uint8)
    assert entropy_maps(images, (1.0,), 0.0, 1.0, 7, [2, 4], 512)[4].tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


def test_values_outside_the_range_count_at_its_ends() -> None:
    pixels = torch.tensor([-torch.inf, -1e30, torch.nan, -0.3, 255.3, 1e30, torch.inf, 255.0])
    maps = entropy_maps(pixels.expand(1, 1, 8, 8), (1.0,), 0.0, 512 / 255, 4, [2], 512)
    torch.testing.assert_close(maps[2], torch.ones(1, 1, 1))  # two equal halves


@pytest.mark.parametrize(("batch", "height", "width"), [(0, 32, 32), (2, 31, 64), (2, 64, 31)])
def test_there_may_be_no_patch(batch: int, height: int, width: int) -> None:
    images = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
    maps = entropy_maps(images, *GRAY, 16, [2, 4], 512)
    assert {factor: scores.shape for factor, scores in maps.items()} == {
        factor: (batch, height // (16 * factor), width // (16 * factor)) for factor in (2, 4)
    }
    assert entropy_maps(images, *GRAY, 16, [], 512) == {}


def test_torch_keeps_its_number_of_threads() -> None:
    """numba's threads, when they start, may change it for torch."""
    script = """
import torch
torch.set_num_threads(2)
from aptvit.patching.kernels.entropy_numba import entropy_maps
entropy_maps(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (1.0, 1.0, 1.0), 0.0, 1.0, 4, [2], 512)
assert torch.get_num_threads() == 2, torch.get_num_threads()
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_several_threads_may_score_at_once(photo_batch: Tensor, threads: int) -> None:
    expected = entropy_maps(photo_batch, *GRAY, 16, [2], 512)[2]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        for maps in pool.map(lambda _: entropy_maps(photo_batch, *GRAY, 16, [2], 512), range(8)):
            assert torch.equal(maps[2], expected)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_a_fork_may_score_after_its_parent(photo_batch: Tensor, threads: int) -> None:
    """As the workers of a data loader do; the threads of some of numba's layers do not survive it."""
    entropy_maps(photo_batch, *GRAY, 16, [2], 512)
    worker = multiprocessing.get_context("fork").Process(
        target=entropy_maps, args=(photo_batch, *GRAY, 16, [2], 512), daemon=True
    )
    worker.start()
    worker.join(30)
    assert worker.exitcode == 0


def test_compiled_code_need_not_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed where nothing can be written, by a user without a home."""
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(lambda x: x)
    for parallel in (False, True):
        assert callable(entropy_numba._kernel.__wrapped__(parallel=parallel))


def test_asking_what_is_installed_imports_nothing() -> None:
    script = f"""
import runpy, sys
found = runpy.run_path({kernels.__file__!r})
assert found["has_numba"]() and isinstance(found["has_triton"](), bool)
assert not {{"numba", "triton", "torch"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
