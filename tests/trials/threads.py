"""Eight threads on one model while others compile, export, calibrate copies and set thresholds: answers as alone."""

from __future__ import annotations

import copy
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from typing import Any

import timm
import torch
from torch import Tensor, nn

import aptvit
from aptvit import merging

from .results import Outcome, Result

__all__ = ["trial"]

THREADS = 8
CALLS = 96  # of a try
SECONDS = 120.0  # after which a try hangs
SIDES = range(64, 129, 16)
TOLERANCE = 1e-5

OPTIONS: tuple[dict[str, Any], ...] = (
    {"keep": 0.6},
    {"thresholds": (6.0, 6.5)},
    {"keep": 0.5, "scales": 3},
    {"scorer": "laplacian", "keep": 0.6},
    {"scorer": "upsample", "keep": 0.6, "window_size": 4, "global_blocks": [1], "area_bias": 0.5, "pad": True},
    {"scorer": "embedding", "keep": 0.6},
    {"scorer": "glance", "keep": 0.6},
    {"scorer": "preview", "keep": 0.6},
    {"keep": 0.6, "max_tokens": 40, "token_bucket": 32},
)
HOSTS = ("vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224")


def trial(deadline: float, seed: int) -> Iterator[Result]:
    """See `tests.trials.kinds.Trial`. A model of a random kind in each try."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    for number in itertools.count():
        if number and time.monotonic() > deadline:
            return
        yield _attempt(number, rng)


def _attempt(number: int, rng: random.Random) -> Result:
    host_name = HOSTS[0] if rng.random() < 0.6 else rng.choice(HOSTS[1:])
    options = dict(rng.choice(OPTIONS if host_name == HOSTS[0] else OPTIONS[:3]))
    tome = host_name == HOSTS[0] and options == OPTIONS[0] and rng.random() < 0.5
    torch.manual_seed(number)
    host: Any = timm.create_model(host_name, depth=2, num_classes=10, dynamic_img_size=True).eval()
    with torch.no_grad():
        host.head.weight.normal_()
    model: Any = aptvit.adapt(host, **options)
    if options.get("scorer") == "glance":
        aptvit.fit_glance(model, torch.rand(8, 3, 224, 224), epochs=1)
    side = model.patch_size * 4
    # PyTorch itself cannot export in one thread and compile in another.
    works: list[Callable[[int], object]] = [rng.choice([_compile, _export]), _calibration(copy.deepcopy(model), side)]
    works = rng.sample(works, rng.randint(0, len(works)))
    if tome:
        model = merging.tome(model, r=4)
    jobs = [_job(model, side, rng, tome) for _ in range(CALLS // 4)]
    if not tome and all(budget for _, budget in jobs):
        works.append(lambda count: setattr(model, "thresholds", (5.0 + count % 3,) * (model.num_scales - 1)))
    name = f"{number}: {host_name}, {options}{', ToMe' if tome else ''}, {len(works)} others"

    @torch.no_grad()
    def answer(job: tuple[list[Tensor], dict[str, Any]]) -> Tensor:
        logits: Tensor = model(torch.stack(job[0]) if tome else job[0], **job[1])
        return logits

    alone = [answer(job) for job in jobs]
    model.train().eval()  # nothing is kept from before
    errors: list[str] = []
    stop = threading.Event()
    others = [threading.Thread(target=_repeat, args=(work, stop, errors), daemon=True) for work in works]
    for other in others:
        other.start()
    pool = ThreadPoolExecutor(THREADS)
    try:
        answers = list(pool.map(answer, jobs * 4, timeout=SECONDS))
    except TimeoutError:
        return Result(name, Outcome.HUNG)
    except Exception as error:
        return Result(name, Outcome.CRASHED, repr(error))
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for other in others:
            other.join(SECONDS)
    if errors:
        return Result(name, Outcome.CRASHED, errors[0])
    largest = max(
        float((got - want).abs().max() / want.abs().max()) for got, want in zip(answers, alone * 4, strict=True)
    )
    return Result(name, Outcome.RIGHT if largest <= TOLERANCE else Outcome.WRONG, f"largest difference {largest:.1e}")


def _job(model: Any, side: int, rng: random.Random, tome: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """One to three images of some size, partly smooth, and a budget of the call."""
    patch = side // 4
    sizes = [(patch * rng.randint(4, 8), patch * rng.randint(4, 8)) for _ in range(rng.randint(1, 3))]
    images = []
    for height, width in sizes[:1] * len(sizes) if tome else sizes:
        image = torch.rand(3, height, width)
        image[:, : height // 2] = rng.random()
        images.append(image)
    budgets: list[dict[str, Any]] = [{}, {"keep": 0.5}, {"keep": 0.75}, {"thresholds": (6.0,) * (_scales(model) - 1)}]
    return images, {} if tome else rng.choice(budgets)


def _scales(model: Any) -> int:
    return getattr(model, "num_scales", 2)


def _repeat(work: Callable[[int], object], stop: threading.Event, errors: list[str]) -> None:
    try:
        for count in itertools.count():
            work(count)
            if stop.is_set():
                return
    except Exception as error:
        errors.append(f"{work}: {error!r}")


def _compile(count: int) -> None:
    torch.compile(nn.Linear(4, 4 + count % 7), backend="eager")(torch.randn(3, 4))


def _export(count: int) -> None:
    torch.export.export(nn.Linear(4, 4 + count % 7), (torch.randn(3, 4),), strict=count % 2 == 0)


def _calibration(model: Any, side: int) -> Callable[[int], object]:
    images = torch.rand(8, 3, side, side)
    return lambda count: aptvit.calibrate(model, images, keep=0.6 + 0.1 * (count % 3))
