"""One model answers many threads at once as it answers alone."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import aptvit

KINDS: dict[str, dict[str, Any]] = {
    "entropy, share": {"keep": 0.6},
    "entropy, thresholds": {"thresholds": (6.0, 6.5)},
    "laplacian": {"scorer": "laplacian", "keep": 0.6},
    "upsample, windows, bias": {
        "scorer": "upsample",
        "keep": 0.6,
        "window_size": 4,
        "global_blocks": [1],
        "area_bias": 0.5,
        "pad": True,
    },
    "embedding": {"scorer": "embedding", "keep": 0.6},
    "glance": {"scorer": "glance", "keep": 0.6},
    "spread": {"scorer": "spread", "keep": 0.6},
    "preview": {"scorer": "preview", "keep": 0.6},
    "limits, buckets": {"keep": 0.6, "max_tokens": 40, "token_bucket": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_eight_threads_get_the_answers_of_one(make_host: Callable[..., Any], crops: Tensor, kind: str) -> None:
    """Images of many sizes, alone and together, with budgets of the model and of the call."""
    model = aptvit.adapt(make_host(dynamic_img_size=True), **KINDS[kind])
    pixels = (crops.float() / 255 - 0.5) / 0.5
    if kind == "glance":
        aptvit.fit_glance(model, pixels[:16], epochs=1)
    if kind == "spread":
        aptvit.fit_spread(model, pixels[:16], lambda x: x, updates=2)
    sizes = [(16 * (4 + i % 5), 16 * (4 + i * 3 % 5)) for i in range(16)]
    separate = [[image[:, :height, :width]] for image, (height, width) in zip(pixels, sizes, strict=False)]
    joint = [[*a, *b] for a, b in itertools.pairwise(separate)]
    budgets = [{}, {"keep": 0.5}, {"keep": 0.75}] if model.keep else [{}, {"thresholds": (6.5,)}]
    jobs = [(batch, budget) for batch in (*separate, *joint[:8]) for budget in budgets]

    @torch.no_grad()
    def answer(job: tuple[list[Tensor], dict[str, Any]]) -> Tensor:
        logits: Tensor = model(job[0], **job[1])
        return logits

    expected = [answer(job) for job in jobs]
    model.train().eval()  # nothing is kept from before
    with ThreadPoolExecutor(8) as pool:
        for got, target in zip(pool.map(answer, jobs), expected, strict=True):
            torch.testing.assert_close(got, target, rtol=1e-5, atol=1e-5)


@contextmanager
def meanwhile(*works: Callable[[int], Any]) -> Iterator[None]:
    """Repeat each work in a thread of its own, by a counter, until the context ends; each at least once."""
    stop, errors = threading.Event(), []

    def repeat(work: Callable[[int], Any], started: threading.Event) -> None:
        try:
            for number in itertools.count():
                started.set()
                work(number)
                if stop.is_set():
                    return
        except BaseException as error:
            errors.append(error)

    events = [threading.Event() for _ in works]
    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(works, events, strict=True)]
    for thread in threads:
        thread.start()
    try:
        for event in events:
            event.wait()
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def jobs_of(crops: Tensor) -> list[list[Tensor]]:
    """Batches of one and of two images, of many sizes."""
    pixels = (crops.float() / 255 - 0.5) / 0.5
    sizes = [(16 * (4 + i % 5), 16 * (4 + i * 3 % 5)) for i in range(12)]
    separate = [[image[:, :height, :width]] for image, (height, width) in zip(pixels, sizes, strict=False)]
    return [*separate, *([*a, *b] for a, b in itertools.pairwise(separate))]


def assert_eight_threads_agree(run: Callable[[Any], Tensor], jobs: list[Any], expected: list[Tensor]) -> None:
    def answer(job: Any) -> Tensor:
        with torch.no_grad():
            return run(job)

    with ThreadPoolExecutor(8) as pool:
        for got, target in zip(pool.map(answer, jobs), expected, strict=True):
            torch.testing.assert_close(got, target, rtol=1e-5, atol=1e-5)


def compile_something(number: int) -> None:
    torch.compile(nn.Linear(4, 4 + number % 7), backend="eager")(torch.randn(3, 4))


def export_something(number: int) -> None:
    torch.export.export(nn.Linear(4, 4 + number % 7), (torch.randn(3, 4),), strict=number % 2 == 0)


@pytest.mark.parametrize("work", [compile_something, export_something])
@pytest.mark.parametrize("kind", ["entropy, share", "upsample, windows, bias", "preview"])
def test_threads_know_nothing_of_compilation_in_another(
    make_host: Callable[..., Any], crops: Tensor, kind: str, work: Callable[[int], None]
) -> None:
    model = aptvit.adapt(make_host(dynamic_img_size=True), **KINDS[kind])
    jobs = jobs_of(crops)
    with torch.no_grad():
        expected = [model(job) for job in jobs]
    with meanwhile(work):
        assert_eight_threads_agree(model, jobs * 2, expected * 2)


def test_calls_do_not_touch_what_an_export_in_another_thread_writes(
    make_host: Callable[..., Any], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own wrapper of functions that are not compiled annotates the graph of the thread that exports."""
    import torch.fx.traceback

    model = aptvit.adapt(make_host(), keep=0.6)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # as all threads read it meanwhile
    monkeypatch.setattr(torch.fx.traceback, "annotate", None)
    with torch.no_grad():
        assert model(images).isfinite().all() and model.layout(images).keep_ratio < 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"keep": 0.6}, id="share", marks=pytest.mark.slow),
        pytest.param({"thresholds": (6.0, 6.5), "token_bucket": 32}, id="buckets"),
    ],
)
def test_a_compiled_model_in_eight_threads(
    make_host: Callable[..., Any], crops: Tensor, options: dict[str, Any]
) -> None:
    """From the first call on, which compiles, while another thread compiles something else."""
    model = aptvit.adapt(make_host(dynamic_img_size=True, depth=1), **options)
    jobs = jobs_of(crops)[::5] * 2
    with torch.no_grad():
        expected = [model(job) for job in jobs]
    torch.compiler.reset()
    model.compile(backend="eager")
    with meanwhile(compile_something):
        assert_eight_threads_agree(model, jobs, expected)


def test_copies_are_calibrated_and_thresholds_change_meanwhile(make_host: Callable[..., Any], crops: Tensor) -> None:
    """Calls with a budget of their own are not touched by what is set on the model, nor by calibration of copies."""
    model = aptvit.adapt(make_host(dynamic_img_size=True), thresholds=(6.0, 6.5), scales=3)
    copied = copy.deepcopy(model)
    pixels = (crops.float() / 255 - 0.5) / 0.5
    budgets: list[dict[str, Any]] = [{"keep": 0.5}, {"keep": 0.75}, {"thresholds": (6.5, 6.0)}]
    jobs = [(job, budget) for job in jobs_of(crops)[::2] for budget in budgets]
    with torch.no_grad():
        expected = [model(job, **budget) for job, budget in jobs]

    def change(number: int) -> None:
        model.thresholds = (5.0 + number % 3, 6.0 + number % 2)

    def calibrate(number: int) -> None:
        aptvit.calibrate(copied, pixels[:8], keep=0.4 + 0.1 * (number % 5))

    with meanwhile(change, calibrate):
        assert_eight_threads_agree(lambda job: model(job[0], **job[1]), jobs, expected)


def test_baselines_in_eight_threads(make_host: Callable[..., Any], photo_batch: Tensor) -> None:
    from aptvit import merging

    host = make_host()
    pixels = (photo_batch.float() / 255 - 0.5) / 0.5
    jobs = [pixels[i : i + n] for i in range(4) for n in (1, 2)] * 4
    for model in (merging.tome(host, r=4), merging.tome(aptvit.adapt(host, keep=0.6), r=4)):
        with torch.no_grad():
            expected = [model(job) for job in jobs]
        with meanwhile(compile_something):
            assert_eight_threads_agree(model, jobs, expected)


ROTARY = ["eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384", "vit_small_patch16_dinov3"]


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_positions_of_many_grids_in_eight_threads(name: str) -> None:
    """timm keeps the rotation of one grid in the module, and replaces it for another."""
    host: Any = timm.create_model(name, depth=1, num_classes=5, dynamic_img_size=True)
    model = aptvit.adapt(host.eval(), keep=0.6)
    side = model.patch_size
    grids = [(rows, columns) for rows in (2, 3, 5, 8) for columns in (2, 4, 7)]
    jobs = [
        [torch.rand(3, side * rows, side * columns) for rows, columns in grids[i : i + 2]] for i in range(0, 11, 2)
    ] * 3
    with torch.no_grad():
        expected = [model(job) for job in jobs[:6]] * 3
    model.train().eval()
    assert_eight_threads_agree(model, jobs, expected)


@torch.no_grad()
def test_a_call_reads_the_budget_once(make_host: Callable[..., Any], images: Tensor) -> None:
    """What another thread sets while a call scores is for later calls."""
    model: Any

    def lowering(pixels: Tensor, patch_size: int, factors: list[int]) -> dict[int, Tensor]:
        model.thresholds = (-1.0, -1.0, -1.0)
        return {f: torch.zeros(len(pixels), *(side // (f * patch_size) for side in pixels.shape[2:])) for f in factors}

    model = aptvit.adapt(make_host(), thresholds=1.0, scorer=lowering)
    assert model.layout(images).counts == [[0, 16]] * len(images)
    assert model.layout(images).is_uniform
