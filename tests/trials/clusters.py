"""A job on a Ray cluster of two nodes, of which something dies at a random moment: every image has one row.

What dies is a node, a worker (as if memory had run out), the driver, or the head, which is then started anew.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .fixtures import good_images, make_models
from .results import Outcome, Result

__all__ = ["FAULTS", "attempt", "trial"]

FAULTS = ("node", "worker", "driver", "head")
IMAGES, PART = 48, 2
SECONDS = 300.0  # after which a job hangs
# A driver whose head is gone waits a minute for it by default.
ENVIRONMENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10", "RAY_gcs_server_request_timeout_seconds": "10"}


def trial(deadline: float, seed: int) -> Iterator[Result]:
    """See `tests.trials.kinds.Trial`. One fault after the other."""
    rng = random.Random(seed)
    number = 0
    while number < 1 or time.monotonic() < deadline:
        yield attempt(FAULTS[number % len(FAULTS)], rng)
        number += 1


def attempt(fault: str, rng: random.Random) -> Result:
    """Start a job, let something die after a random number of parts, continue the job where it ended."""
    with tempfile.TemporaryDirectory(prefix="aptvit-trials-") as place:
        root = Path(place).resolve()
        make_models(root / "models")
        good_images(root / "data", IMAGES)
        (root / "data" / "bad.png").write_bytes(b"no image")
        after = rng.randint(1, IMAGES // PART // 2)
        name = f"{fault} after {after} parts"
        cluster = _cluster()
        try:
            driver = _start(root, cluster.address)
            _wait_for_parts(root, driver, after)
            cluster = _fail(fault, cluster, driver)
            code, said = _end(driver)
            if fault in ("driver", "head"):
                code, said = _end(_start(root, cluster.address))
        finally:
            cluster.shutdown()
        return _result(name, root, code, said)


def _cluster() -> Any:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    return cluster


def _start(root: Path, address: str) -> subprocess.Popen[str]:
    words = ["embed", "data", "--model", root / "models" / "model", "--out", "out", "--part-size", PART]
    command = [sys.executable, "-m", "aptvit", *words, "--actors", 2, "--address", address]
    output = (root / "log").open("a")
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.Popen(list(map(str, command)), cwd=root, stdout=output, stderr=output, text=True, env=environment)


def _wait_for_parts(root: Path, driver: subprocess.Popen[str], number: int) -> None:
    started = time.monotonic()
    while driver.poll() is None and time.monotonic() < started + SECONDS:
        if len(list((root / "out").glob("part-*"))) >= number:
            return
        time.sleep(0.02)


def _fail(fault: str, cluster: Any, driver: subprocess.Popen[str]) -> Any:
    """Let something die; the cluster on which the job is continued."""
    import psutil

    if fault == "node":
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    elif fault == "worker":
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::MapWorker"):
                process.kill()
                break
    elif fault == "driver":
        driver.kill()
    else:
        cluster.shutdown()
        return _cluster()
    return cluster


def _end(driver: subprocess.Popen[str]) -> tuple[int | None, str]:
    try:
        return driver.wait(SECONDS), ""
    except subprocess.TimeoutExpired:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        return None, "stopped by the trial"


def _result(name: str, root: Path, code: int | None, said: str) -> Result:
    import pyarrow.parquet

    detail = f"exit code {code} {said}: {(root / 'log').read_text()[-6000:]}"
    if code is None:
        return Result(name, Outcome.HUNG, detail)
    rows = [row for part in (root / "out").glob("part-*") for row in pyarrow.parquet.read_table(part).to_pylist()]
    names = [row["file"] for row in rows]
    if len(names) != IMAGES + 1 or len(set(names)) != IMAGES + 1:
        return Result(name, Outcome.LOST, f"{len(names)} rows of {len(set(names))} images. {detail}")
    errors = [row["file"] for row in rows if row["error"]]
    if len(errors) != 1 or not errors[0].endswith("bad.png"):
        return Result(name, Outcome.WRONG, f"rows with an error: {errors}. {detail}")
    return Result(name, Outcome.RIGHT if code == 1 else Outcome.CRASHED, detail)  # 1: an image has an error
