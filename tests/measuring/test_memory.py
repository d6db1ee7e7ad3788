"""Counted bytes."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from aptvit.measuring import memory
from aptvit.measuring.memory import keep_freed_memory, peak_memory, storage_bytes

MEGA = 10**6


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


def test_a_storage_counts_once() -> None:
    a, b = torch.zeros(10), torch.zeros(7, dtype=torch.float16)
    assert storage_bytes([a, a.view(2, 5), a[3:], b]) == 40 + 14


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_takes_the_allocator_settings() -> None:
    assert keep_freed_memory()


def test_free_memory_is_the_least_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, container = tmp_path / "meminfo", tmp_path / "container"
    machine.write_text("MemTotal: 9000 kB\nMemAvailable:    500 kB\n")
    monkeypatch.setattr(memory, "_MEMORY_INFO", machine)
    monkeypatch.setattr(memory, "_CONTAINER", container)
    assert memory.free_memory("cpu") == 500 * 1024
    container.mkdir()
    (container / "memory.current").write_text("1000\n")
    (container / "memory.max").write_text("max\n")
    assert memory.free_memory("cpu") == 500 * 1024
    (container / "memory.max").write_text("3000\n")
    assert memory.free_memory("cpu") == 2000
    machine.unlink()
    (container / "memory.max").unlink()
    assert memory.free_memory("cpu") > 2**28  # the machine's
