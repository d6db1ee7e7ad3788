"""What a measurement ran on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import timm
import torch

from aptvit.measuring.machine import describe_device, describe_environment, digest_files, prepare_machine


def test_the_environment_names_versions_and_threads() -> None:
    environment = describe_environment(memory_kept=True)
    assert environment["torch"] == torch.__version__ and environment["timm"] == timm.__version__
    assert environment["threads"] == str(torch.get_num_threads()) and "mallopt" in environment["allocator"]
    assert describe_device("cpu") == f"cpu ({torch.get_num_threads()} threads)"


def test_a_machine_that_is_prepared_is_described() -> None:
    environment = prepare_machine("cpu")
    assert environment["device"] == describe_device("cpu") and "allocator" in environment


def test_a_digest_follows_from_the_contents(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_text(path.name * 3)
    expected = hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in (b"aaa", b"bbb"))).hexdigest()[:12]
    assert digest_files(paths) == expected != digest_files(paths[:1])
    assert digest_files([*paths, tmp_path / "gone"]) != expected
