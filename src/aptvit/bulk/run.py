"""Run the parts of a job: in this process, or in actors on Ray."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import Any

from aptvit.bulk.embedder import Embedder, data_config, decode
from aptvit.bulk.job import Job
from aptvit.bulk.listing import read_entries
from aptvit.hosts.pretrained import evaluation_transform

__all__ = ["run_here", "run_on_ray"]

PartCallback = Callable[[int], None]
"""Called with the number of images of a part that was written."""


def run_here(job: Job, device: str = "cpu", threads: int = 2, done: PartCallback = lambda number: None) -> None:
    """Run the unfinished parts of a job in this process.

    Args:
        job: The job.
        device: Torch device that the model runs on.
        threads: Number of threads that read and decode images.
        done: Called after each part with the number of its images.

    Raises:
        ValueError: If the model does not exist or has no trained weights.
        OSError: If a part cannot be written.
    """
    job.tidy()
    missing = job.missing()
    if not missing:
        return
    embedder = Embedder(job.options, device)
    job.check_weights()
    for number in missing:
        entries = job.part(number)
        job.write(number, embedder.rows(embedder.decoded(entries, threads)))
        done(len(entries))


def run_on_ray(job: Job, address: str | None = None, actors: int = 1, done: PartCallback = lambda number: None) -> None:
    """Run the unfinished parts of a job on Ray: tasks read and decode images, actors hold the model and write parts.

    Ray replaces workers that die and runs their parts again. If this process dies, another call continues the job.

    Args:
        job: The job. Its source and folder must be reachable from all machines.
        address: Address of a Ray cluster; None starts Ray on this machine.
        actors: Number of actors that hold the model, each on a GPU if the cluster has any, else on a CPU core.
        done: Called after each part with the number of its images.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If the model does not exist or has no trained weights.
    """
    try:
        import ray
    except ImportError:
        raise ImportError("running on Ray needs the package ray: pip install 'aptvit[ray]'") from None
    job.tidy()
    missing = job.missing()
    if not missing:
        return
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpu = ray.cluster_resources().get("GPU", 0) >= 1
    # Actors that took all cores would leave none for the tasks that read: they would wait forever.
    resources: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": 0.75}
    # Entries and images are pickled to bytes, which Ray copies without conversion. A task reads a part and an actor
    # writes it; Ray's object store limits how many parts wait in between.
    rows = [{"number": number, "entries": pickle.dumps(list(job.part(number)))} for number in missing]
    data = data_config(job.options)
    parts: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    read = parts.map(_read_part, fn_args=(data,), num_cpus=0.25)
    device = "cuda" if gpu else "cpu"
    written = read.map(_Actor, fn_constructor_args=(job, device), concurrency=actors, **resources)
    for row in written.iter_rows():
        done(int(row["images"]))


def _read_part(row: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Read and decode the images of a part, in a Ray task."""
    entries = pickle.loads(row["entries"])
    transform = evaluation_transform(data)
    images = [decode(*item, transform) for item in zip(entries, read_entries(entries), strict=True)]
    return {"number": row["number"], "images": pickle.dumps(images)}


class _Actor:
    """Holds the model, computes the rows of decoded parts and writes them, in a Ray actor."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.embedder = job, Embedder(job.options, device)
        job.check_weights()  # a folder of the same name on another machine may hold another model

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        images = pickle.loads(row["images"])
        self.job.write(int(row["number"]), self.embedder.rows(images))
        return {"images": len(images)}
