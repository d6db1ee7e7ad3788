"""Jobs on Ray: the rows are those of a job in one process, one driver runs at a time, and what fails is told."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aptvit.bulk import Job, run_here, run_on_ray
from aptvit.bulk import run as module
from aptvit.storage.writing import WriteError

from .conftest import options, rows

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Ray in this process, whose workers have this module's classes by value."""
    import sys

    ray.init("local", num_cpus=2, log_to_driver=False)  # not a cluster that runs here already
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


def test_on_ray(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    job = Job(str(images), options(checkpoint), str(tmp_path / "ray"), 8)
    run_on_ray(job, done=counts.append)
    assert sum(counts) == len(job.entries) and not job.missing()
    run_here(Job(str(images), options(checkpoint), str(tmp_path / "here"), 8))
    for a, b in zip(rows(tmp_path / "ray"), rows(tmp_path / "here"), strict=True):
        feature = a.pop("feature"), b.pop("feature")
        assert a == b
        if feature[0] is not None:
            np.testing.assert_allclose(*feature, rtol=1e-4, atol=1e-5)


def test_a_second_driver_is_refused(
    images: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(str(images), options(checkpoint), str(tmp_path), 8)
    with job.only_writer(), pytest.raises(ValueError, match="another process writes to"):
        run_on_ray(job)
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    with module._only_driver(ray, "s3://bucket/out"):  # as from another machine
        refused = pytest.raises(ValueError, match=r"another process of the cluster writes to s3://bucket/out")
        with refused, module._only_driver(ray, "s3://bucket/out"):
            pass
        with module._only_driver(ray, "s3://bucket/elsewhere"):
            pass


class Deadly(Job):
    """A job whose workers die when they write its second part, as if memory had run out."""

    def write(self, number: int, rows: Any) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(number, rows)


def test_a_part_that_kills_its_workers_is_told_and_all_others_are_written(
    images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    job = Deadly(str(images), options(checkpoint), str(tmp_path), 8)
    with pytest.raises(ConnectionError, match=r"1 parts are not written, the first is 1: their workers died 6 times"):
        run_on_ray(job)
    assert job.missing() == [1]
    run_here(Job(str(images), options(checkpoint), str(tmp_path), 8))
    assert len({row["file"] for row in rows(tmp_path)}) == len(rows(tmp_path)) == len(job.entries)


class Full(Job):
    """A job whose disk is full."""

    def write(self, number: int, rows: Any) -> None:
        raise WriteError(f"part {number}", "the disk is full", True)


def test_a_full_disk_is_one_error(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}: the disk is full"):
        run_on_ray(Full(str(images), options(checkpoint), str(tmp_path), 8))
