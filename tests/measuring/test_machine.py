"""What a measurement ran on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import timm
import torch

from aptvit.measuring import machine
from aptvit.measuring.machine import computes_in_bfloat16, digest_files, prepare_machine


def test_the_environment_names_device_versions_and_threads() -> None:
    environment, threads = prepare_machine("cpu"), torch.get_num_threads()
    assert environment["torch"] == torch.__version__ and environment["timm"] == timm.__version__
    assert environment["threads"] == str(threads) and environment["device"] == f"cpu ({threads} threads)"


@pytest.mark.parametrize(("is_glibc", "words"), [(True, "mallopt"), (False, "as the system has it")])
def test_the_environment_names_the_allocator(is_glibc: bool, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: is_glibc)
    assert words in prepare_machine("cpu")["allocator"]


def test_a_digest_follows_from_the_contents(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_text(path.name * 3)
    expected = hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in (b"aaa", b"bbb"))).hexdigest()[:12]
    assert digest_files(paths) == expected != digest_files(paths[:1])
    assert digest_files([*paths, tmp_path / "gone"]) != expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": False, "cpu_name": "bf16"}, False),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_it(
    capabilities: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert computes_in_bfloat16("cpu") is expected
