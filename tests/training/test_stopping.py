"""Trainings that signals stop, at any moment: a checkpoint, a status that is not 0, and the same weights in the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from aptvit.training import ClassificationRecipe
from aptvit.training.processes import Processes, ProcessLost
from aptvit.training.stopping import StopSignals

from .conftest import MODEL, same

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs signals of POSIX")

# A process that imports everything once and forks a child for each training, in a process group of its own.
_FORKS = """
import json, os, signal, socket, subprocess, sys, time
import accelerate, matplotlib.figure, numba, tensorboard.compat, torch._dynamo, torch.utils.tensorboard, torchmetrics
torch.set_num_threads(1)
for number in (signal.SIGHUP, signal.SIGTERM):  # they may be ignored where the tests run
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from aptvit import cli
from aptvit.training import checkpoints, run_folder
from aptvit.training.tasks import classification
from aptvit.training.trainer import Training

part, folder, weights, out = sys.argv[1:]
Training._measure_speedup = lambda self: None
SETTINGS = "precision=float32 per_image=false recalibrate=2 lr=1e-3 save_every=1 epochs=2 batch_size=8 keep=0.6".split()

def before(owner, name, when, action):
    function = getattr(owner, name)
    def wrapped(*args, **options):
        if when(*args):
            action()
        return function(*args, **options)
    setattr(owner, name, wrapped)

def train(run, workers, hook, *words):
    words = ["finetune", folder, "--model", "MODEL", "--checkpoint", weights, "--out", f"{out}/{run}", *words]
    sys.argv = ["aptvit", *words, "--recipe", "full"]
    for setting in (*SETTINGS, f"workers={workers}", "lr_batch=0", "mixup=0", "cutmix=0", "micro_batch_size=8"):
        sys.argv += ["--set", setting]
    hook()
    cli.main()
    sys.exit(0)

def start(run, workers=0, hook=lambda: None, *words, rank=None):
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        if rank is not None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{out}/{run}{rank or ''}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        train(run, workers, hook, *words)
    return child

def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def to_group(number):
    # By another process: what a worker gets from the process that started it is a request to end.
    return lambda: subprocess.run(["kill", "-s", number.name.removeprefix("SIG"), "--", f"-{os.getpgid(0)}"])

def to_process(number):
    return lambda: os.kill(os.getpid(), number)

def twice(action):
    return lambda: (action(), action())

def at_update(number, action):
    return lambda: before(Training, "_update", lambda self, *_: self.update == number, action)

def in_evaluation(action):
    return lambda: before(classification, "score_model", lambda *_: True, action)

def in_checkpoint(action):
    return lambda: before(checkpoints, "save_state", lambda state, *_: state["update"] == 2, action)

def fail():
    raise ValueError("made up")

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

# One after the other, in one folder: each continues what the one before left.
ONE = (
    ("first step", 0, at_update(0, to_process(signal.SIGHUP))),
    ("checkpoint", 0, in_checkpoint(twice(to_group(signal.SIGTERM)))),
    ("evaluation", 1, in_evaluation(to_group(signal.SIGINT))),
    ("loader", 1, at_update(3, to_group(signal.SIGTERM))),
    ("error", 1, at_update(4, fail)),
    ("twice", 0, at_update(4, twice(to_group(signal.SIGINT)))),
    ("last step", 0, at_update(5, to_process(signal.SIGTERM))),
    ("finished", 0, lambda: None),
)
PAIR = (
    ("second lost", 1, at_update(1, to_process(signal.SIGKILL))),
    ("first lost", 0, at_update(2, to_process(signal.SIGKILL))),
    ("both stopped", 1, at_update(3, to_process(signal.SIGTERM))),
    ("both finished", 0, lambda: None),
)

results = {}
if part == "one":
    results["whole"] = status(start("whole"))
for name, workers, hook in ONE if part == "one" else ():
    results[name] = [status(start("stopped", workers, hook, "--resume")), max(os.listdir(f"{out}/stopped/checkpoints"))]
for name, hit, hook in PAIR if part == "pair" else ():
    port, began = free_port(), time.monotonic()
    hooks = [hook if rank == hit else lambda: None for rank in range(2)]
    children = [start("pair", 0, hooks[rank], "--resume", rank=rank) for rank in range(2)]
    results[name] = [[status(child) for child in children], time.monotonic() - began]
    results[name].append(max(os.listdir(f"{out}/pair/checkpoints")))
if part == "pair":
    port = free_port()
    results["whole pair"] = [status(child) for child in [start("whole pair", rank=rank) for rank in range(2)]]
print(json.dumps(results))
""".replace("MODEL", MODEL)


@pytest.fixture(scope="module")
def stopped(folder: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of trainings in one process, and by name what they ended with."""
    return _trainings("one", folder, checkpoint, tmp_path_factory.mktemp("stopped"))


@pytest.fixture(scope="module")
def pairs(folder: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same in two processes."""
    return _trainings("pair", folder, checkpoint, tmp_path_factory.mktemp("pairs"))


def _trainings(part: str, folder: Path, checkpoint: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    command = [sys.executable, "-c", _FORKS, part, str(folder), str(checkpoint), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, json.loads(done.stdout.splitlines()[-1])


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "model" / "model.safetensors")


def scores(run: Path) -> list[dict[str, Any]]:
    evaluations: list[dict[str, Any]] = json.loads((run / "results.json").read_text())["evaluations"]
    return evaluations


def test_a_signal_at_any_moment_writes_a_checkpoint(stopped: tuple[Path, dict[str, Any]]) -> None:
    out, results = stopped
    errors = (out / "stopped.err").read_text()
    assert results["whole"] == 0, (out / "whole.err").read_text()
    moments = ("first step", "checkpoint", "evaluation", "loader", "twice", "last step")
    assert [results[name] for name in moments] == [[130, f"{update:08d}"] for update in range(1, 7)], errors
    assert results["error"] == [2, "00000004"] and "aptvit: made up" in errors  # workers do not keep the process
    for update in range(1, 7):
        assert f"stopped after {update} updates: continue with the same command and --resume" in errors
    assert "Traceback" not in errors


def test_a_training_that_was_stopped_ends_as_the_whole_one(stopped: tuple[Path, dict[str, Any]]) -> None:
    out, results = stopped
    assert results["finished"][0] == 0, (out / "stopped.err").read_text()
    assert same(weights(out / "stopped"), weights(out / "whole"))
    assert scores(out / "stopped") == scores(out / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "survivor"), [("second lost", 0), ("first lost", 1)])
def test_a_process_whose_partner_was_killed_ends_with_a_line(
    name: str, survivor: int, pairs: tuple[Path, dict[str, Any]]
) -> None:
    out, results = pairs
    codes, seconds, newest = results[name]
    errors = (out / f"pair{survivor or ''}.err").read_text()
    assert codes[survivor] == 1 and codes[1 - survivor] == -signal.SIGKILL, errors
    assert seconds < 60 and newest == ("00000001" if survivor == 0 else "00000002")
    (line,) = [line for line in errors.splitlines() if line.startswith("aptvit: ")]
    assert "another process of the training ended" in line and "--resume" in line and "Traceback" not in errors


@pytest.mark.slow
def test_two_processes_stop_together_and_end_as_whole_ones(pairs: tuple[Path, dict[str, Any]]) -> None:
    out, results = pairs
    codes, _, newest = results["both stopped"]  # the signal reached one of them
    assert codes == [130, 130] and newest == "00000004", (out / "pair.err").read_text()
    assert results["both finished"][0] == results["whole pair"] == [0, 0], (out / "pair.err").read_text()
    assert same(weights(out / "pair"), weights(out / "whole pair"))


def test_a_worker_that_was_killed_is_told() -> None:
    watched = Processes(ClassificationRecipe(precision="float32")).watched()
    message = r"a worker that reads images was killed, .*continue with --resume"
    with pytest.raises(ProcessLost, match=message), watched:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="peer"), Processes(ClassificationRecipe(precision="float32")).watched():
        raise RuntimeError("peer pressure")  # there is no other process


def test_signals_that_are_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def interrupts() -> Iterator[None]:
    """Context in which SIGINT interrupts, which may be ignored where the tests run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_later_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with interrupts(), StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # passed on by torchrun
        assert stop.requested
        now += 1.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
