"""Who does the parts of a job: this process, or actors on Ray."""

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

Told = Callable[[int], None]


def run_here(job: Job, device: str = "cpu", threads: int = 2, done: Told = lambda number: None) -> None:
    """Do what is missing of a job in this process.

    Args:
        job: The job.
        device: Where the model runs.
        threads: That read and decode.
        done: Called with the number of images of each part that is written.
    """
    job.tidy()
    missing = job.missing()
    if not missing:
        return
    embedder = Embedder(job.options, device)
    for number in missing:
        entries = job.part(number)
        job.write(number, embedder.rows(embedder.decoded(entries, threads)))
        done(len(entries))


def run_on_ray(job: Job, address: str | None = None, actors: int = 1, done: Told = lambda number: None) -> None:
    """Do what is missing of a job on Ray: images are read and decoded in tasks, the model lives in actors.

    Workers that die are replaced and their parts done again; if this process dies, calling it again goes on.

    Args:
        job: The job. Its source and folder must be reachable from all machines.
        address: Of a cluster; None for this machine.
        actors: That hold the model, each with a GPU if there is one, else a core.
        done: As for `run_here`.

    Raises:
        ImportError: If Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ImportError("many machines need Ray: pip install 'aptvit[ray]'") from None
    job.tidy()
    missing = job.missing()
    if not missing:
        return
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpu = ray.cluster_resources().get("GPU", 0) >= 1
    # An actor on each core would leave none to read with, and wait for ever.
    resources: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": 0.75}
    # Parts are rows of bytes: Ray moves them as they are. Each is read in a task and written by an actor, and as many
    # wait in between as Ray's object store has room for.
    rows = [{"number": number, "entries": pickle.dumps(list(job.part(number)))} for number in missing]
    data = data_config(job.options)
    parts: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    read = parts.map(_read_part, fn_args=(data,), num_cpus=0.25)
    device = "cuda" if gpu else "cpu"
    written = read.map(_Actor, fn_constructor_args=(job, device), concurrency=actors, **resources)
    for row in written.iter_rows():
        done(int(row["images"]))


def _read_part(row: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """A task: the images of one part, decoded."""
    entries = pickle.loads(row["entries"])
    transform = evaluation_transform(data)
    images = [decode(*one, transform) for one in zip(entries, read_entries(entries), strict=True)]
    return {"number": row["number"], "images": pickle.dumps(images)}


class _Actor:
    """Holds the model; turns decoded parts into files."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.embedder = job, Embedder(job.options, device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        images = pickle.loads(row["images"])
        self.job.write(int(row["number"]), self.embedder.rows(images))
        return {"images": len(images)}
