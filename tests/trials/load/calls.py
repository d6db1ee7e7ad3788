"""Many calls of one model with images of random sizes: memory stays flat, and answers stay the same."""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Iterator

import torch

from ..results import Outcome, Result
from .memory import Memory
from .models import make_model

__all__ = ["call_often", "trial"]

CALLS = 10_000
MAX_GROWTH = 0.05
SIDES = range(64, 129, 16)


@torch.no_grad()
def call_often(calls: int, compiled: bool, seed: int, deadline: float = float("inf")) -> list[Result]:
    """Call a model with batches of one to four images, and compare memory after a tenth of the calls with the end."""
    model = make_model()
    if compiled:
        model.compile(backend="aot_eager")
    generator = torch.Generator().manual_seed(seed)
    probe = [torch.rand(3, 96, 64, generator=generator)]
    expected, memory, done = model(probe), Memory(os.getpid()), 0
    while done < calls and time.monotonic() < deadline:
        count, *sides = torch.randint(0, len(SIDES), (9,), generator=generator).tolist()
        sizes = [(SIDES[sides[2 * i]], SIDES[sides[2 * i + 1]]) for i in range(min(count, 3) + 1)]
        model([torch.rand(3, *size, generator=generator) for size in sizes])
        done += 1
        if done % 20 == 0:
            gc.collect(0)
            memory.sample()
    name = f"{done} calls, {'compiled' if compiled else 'eager'}, seed {seed}"
    same = bool((model(probe) - expected).abs().max() <= 1e-5 * expected.abs().max())
    results = [Result(f"{name}: answers", Outcome.RIGHT if same else Outcome.WRONG)]
    if len(memory.samples) >= 10:  # compiling settles in the first calls
        growth = memory.growth(0.5 if compiled else 0.2)
        outcome = Outcome.RIGHT if growth < MAX_GROWTH else Outcome.CRASHED
        results.append(Result(f"{name}: memory", outcome, f"{memory.samples[-1] / 1e6:.0f} MB, growth {growth:+.1%}"))
    return results


def trial(deadline: float, seed: int) -> Iterator[Result]:
    """Up to 10,000 calls, eager and then compiled."""
    now = time.monotonic()
    yield from call_often(CALLS, False, seed, now + (deadline - now) / 3)
    yield from call_often(CALLS, True, seed, deadline)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.trials.load.calls")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    for result in call_often(options.calls, options.compiled, 0):
        print(result)
