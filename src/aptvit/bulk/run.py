"""Run the parts of a job: in this process, or in actors on Ray."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aptvit.bulk.attempts import MOST, Attempts
from aptvit.bulk.embedder import Embedder, decode
from aptvit.bulk.job import Job
from aptvit.bulk.listing import read_entries
from aptvit.hosts.pretrained import evaluation_transform
from aptvit.storage.agreement import digest_texts
from aptvit.storage.writing import WriteError

__all__ = ["run_here", "run_on_ray"]

_SECONDS = 10.0  # in which Ray notices that a driver has ended

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
        ValueError: If the model does not exist or has no trained weights, or another process runs the job.
        OSError: If a part cannot be written.
    """
    with job.only_writer():
        job.tidy()
        missing = job.missing()
        if not missing:
            return
        embedder = job.embedder(device)
        for number in missing:
            entries = job.part(number)
            job.write(number, embedder.rows(embedder.decoded(entries, threads)))
            done(len(entries))


def run_on_ray(job: Job, address: str | None = None, actors: int = 1, done: PartCallback = lambda number: None) -> None:
    """Run the unfinished parts of a job on Ray: tasks read and decode images, actors hold the model and write parts.

    Ray replaces workers and nodes that die and runs their parts again. If this process or Ray's head dies, another call
    continues the job.

    Args:
        job: The job. Its source and folder must be reachable from all machines.
        address: Address of a Ray cluster; None starts Ray on this machine.
        actors: Number of actors that hold the model, each on a GPU if the cluster has any, else on a CPU core.
        done: Called after each part with the number of its images.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If the model does not exist or has no trained weights, or another process runs the job.
        WriteError: If a part cannot be written.
        ConnectionError: If the cluster cannot be reached, or parts are missing at the end, because their workers died
            again and again; all others are written.
    """
    try:
        import ray
    except ImportError:
        raise ImportError("running on Ray needs the package ray: pip install 'aptvit[ray]'") from None
    with job.only_writer():
        job.tidy()
        missing = job.missing()
        if not missing:
            return
        try:
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConnectionError(f"no Ray cluster at {address}: {reason}") from error
        with _only_driver(ray, job.out):
            _run_parts(ray, job, missing, actors, done)
        missing = job.missing()
        if missing:
            raise ConnectionError(
                f"{len(missing)} parts are not written, the first is {missing[0]}: their workers died {MOST} times, as "
                "happens for too little memory; the same command tries again, another --out takes a smaller "
                "--part-size or --pack-tokens"
            )


@contextmanager
def _only_driver(ray: Any, out: str) -> Iterator[None]:
    """Context in which no other driver of the cluster writes to a folder: an actor has the name of the folder."""
    name, end = f"aptvit {digest_texts([out])}", time.monotonic() + _SECONDS
    while True:
        try:
            actor = ray.remote(num_cpus=0)(_Driver).options(name=name, namespace="aptvit").remote()
            break
        except ValueError:
            if time.monotonic() > end:
                raise ValueError(
                    f"another process of the cluster writes to {out}: wait until it has ended, or give another --out"
                ) from None
            time.sleep(0.5)
    try:
        yield
    finally:
        ray.kill(actor)


class _Driver:
    """An actor that does nothing: it has a name for as long as its driver runs."""


def _run_parts(ray: Any, job: Job, missing: Sequence[int], actors: int, done: PartCallback) -> None:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    gpu = ray.cluster_resources().get("GPU", 0) >= 1
    # Actors that took all cores would leave none for the tasks that read: they would wait forever.
    resources: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": 0.75}
    # Entries and images are pickled to bytes, which Ray copies without conversion. A task reads a part and an actor
    # writes it; Ray's object store limits how many parts wait in between.
    rows = [{"number": number, "entries": pickle.dumps(list(job.part(number)))} for number in missing]
    parts: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    read = parts.map(_read_part, fn_args=(job.data, job.attempts), num_cpus=0.25)
    device = "cuda" if gpu else "cpu"
    pool = ray.data.ActorPoolStrategy(size=actors)
    written = read.map(_Actor, fn_constructor_args=(job, device), compute=pool, **resources)
    for row in written.iter_rows():
        if row["error"]:
            raise ValueError(row["error"]) if row["is_input"] else WriteError(job.out, row["error"])
        done(int(row["images"]))


def _read_part(row: dict[str, Any], data: dict[str, Any], attempts: Attempts) -> dict[str, Any]:
    """Read and decode the images of a part, in a Ray task; no bytes if it was given up."""
    number = int(row["number"])
    if not attempts.begin(number, "read"):
        return {"number": number, "images": b""}
    entries = pickle.loads(row["entries"])
    transform = evaluation_transform(data)
    images = [decode(*item, transform) for item in zip(entries, read_entries(entries), strict=True)]
    content = pickle.dumps(images)
    attempts.end(number, "read")
    return {"number": number, "images": content}


class _Actor:
    """Holds the model, computes the rows of decoded parts and writes them, in a Ray actor."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.device, self.attempts = job, device, job.attempts
        self.embedder: Embedder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write a part; an error is returned, because what an actor raises reaches the driver inside others."""
        number = int(row["number"])
        if not row["images"] or not self.attempts.begin(number, "write"):
            return {"images": 0, "error": "", "is_input": False}
        images = pickle.loads(row["images"])
        try:
            if self.embedder is None:
                # A folder of the same name on another machine may hold another model.
                self.embedder = self.job.embedder(self.device)
            self.job.write(number, self.embedder.rows(images))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, WriteError) else str(error)
            return {"images": 0, "error": reason, "is_input": isinstance(error, ValueError)}
        self.attempts.end(number, "write")
        return {"images": len(images), "error": "", "is_input": False}
