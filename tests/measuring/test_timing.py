"""What measuring rests on: the order of rounds, counted operations, counted bytes."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from aptvit.measuring.timing import (
    Spread,
    count_flops,
    describe_device,
    describe_environment,
    interleaved,
    keep_freed_memory,
    peak_memory,
)

MEGA = 10**6


def test_rounds_are_interleaved_and_the_order_alternates() -> None:
    calls: list[str] = []
    seconds = interleaved([partial(calls.append, name) for name in "abc"], 3, "cpu")
    assert "".join(calls) == "abccbaabc"
    assert [len(one) for one in seconds] == [3, 3, 3] and min(map(min, seconds)) >= 0
    calls.clear()
    interleaved([partial(calls.append, name) for name in "ab"], 1, "cpu", first=1)
    assert "".join(calls) == "ba"


def test_spread_is_of_paired_ratios() -> None:
    assert Spread.of_ratios([6.0, 2.0, 4.0], [2.0, 2.0, 1.0]) == Spread(median=3.0, least=1.0, most=4.0)
    with pytest.raises(ValueError):
        Spread.of_ratios([1.0, 2.0], [1.0])


def test_operations_of_a_linear_map_forward_and_backward() -> None:
    linear, x = nn.Linear(7, 3), torch.randn(5, 7, requires_grad=True)
    once = 2 * 5 * 7 * 3
    assert count_flops(lambda: linear(x)) == once
    assert count_flops(lambda: linear(x).sum().backward()) == 3 * once  # gradients of the input and of the weight


def test_operations_of_fused_attention_forward_and_backward() -> None:
    q, k, v = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3))
    product = 2 * (2 * 3) * 20 * 20 * 8
    with torch.no_grad():
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    # Backward: the scores once more, and the gradients of v, of the scores, of q and of k.
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == (2 + 5) * product


def test_peak_memory_of_known_allocations() -> None:
    there = torch.zeros(10 * MEGA // 4)

    def step() -> None:
        a = torch.empty(4 * MEGA // 4)  # 4
        b = a.view(2, -1)[0] + 1  # 4 + 2; the view is free
        del a  # 2
        b.add_(1)
        c = torch.empty(3 * MEGA // 4)  # 2 + 3
        there.mul_(2)
        del b, c

    assert peak_memory(step, "cpu") == 6 * MEGA
    assert peak_memory(step, "cpu") == 6 * MEGA  # nothing is left from the call before


def test_freeing_what_was_there_before_does_not_count() -> None:
    kept = [torch.zeros(8 * MEGA // 4)]

    def step() -> None:
        kept[0].add_(1)
        kept.clear()
        kept.append(torch.ones(2 * MEGA // 4))

    assert peak_memory(step, "cpu") == 2 * MEGA


def training_step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the optimizer's state is there from now on
    return step


def profiled_peak(step: Callable[[], Any], trace: Path) -> int:
    """The same from PyTorch's profiler, which asks the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


def test_peak_memory_of_a_training_step_is_what_the_profiler_says(tmp_path: Path) -> None:
    step = training_step(timm.create_model("test_vit"), torch.randn(2, 3, 160, 160))
    assert peak_memory(step, "cpu") == pytest.approx(profiled_peak(step, tmp_path / "trace.json"), rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_a_gpu() -> None:
    there = torch.zeros(16 * 2**20, dtype=torch.uint8, device="cuda")

    def step() -> None:
        a = torch.empty(8 * 2**20, dtype=torch.uint8, device="cuda")
        del a
        b = torch.empty(4 * 2**20, dtype=torch.uint8, device="cuda")
        there.add_(b[0])

    assert peak_memory(step, "cuda") == pytest.approx(8 * 2**20, abs=2**12)


def test_the_environment_names_versions_and_threads() -> None:
    environment = describe_environment(memory_kept=True)
    assert environment["torch"] == torch.__version__ and environment["timm"] == timm.__version__
    assert environment["threads"] == str(torch.get_num_threads()) and "mallopt" in environment["allocator"]
    assert describe_device("cpu") == f"cpu ({torch.get_num_threads()} threads)"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_takes_the_allocator_settings() -> None:
    assert keep_freed_memory()
