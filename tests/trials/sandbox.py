"""Runs a command in a fork of this process, with limits, and watches what it does."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MAX_GROWTH", "MAX_SECONDS", "Ended", "fresh", "import_libraries", "listening", "run"]

MAX_SECONDS = 20.0
MAX_GROWTH = 2_000_000_000  # bytes in memory, above those of the process before the command
# What commands import; a fork has all of it at once.
LIBRARIES = ("accelerate", "av", "datasets", "matplotlib.pyplot", "onnxscript", "pyarrow.dataset", "pyarrow.parquet")
LIBRARIES += ("faster_coco_eval", "supervision", "torchmetrics.detection", "transformers", "webdataset.tariterators")
LIBRARIES += ("aptvit.bulk", "aptvit.cli", "aptvit.compare.clips", "aptvit.compare.comparison", "aptvit.dense")
LIBRARIES += ("aptvit.benchmark.run", "aptvit.evaluation.run", "aptvit.evaluation.training_run", "aptvit.export.check")
LIBRARIES += ("aptvit.report.page", "aptvit.report.patches", "aptvit.report.prediction_files", "aptvit.vlm")
LIBRARIES += ("aptvit.training.run_folder", "torch.utils.tensorboard", "torchvision", "yaml", "fsspec")

_PAGE = resource.getpagesize()
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {  # arguments of the path, and of the folder it is in
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
}
_PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
_NETWORK = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")


def import_libraries(root: Path) -> None:
    """Import what commands import, and prepare this process to be forked; in a folder is what is compiled."""
    os.environ["OMP_NUM_THREADS"] = "1"  # and so no threads, which a fork would lose
    os.environ["NUMBA_CACHE_DIR"] = str(root / "numba")
    import torch

    torch.set_num_threads(1)
    for library in LIBRARIES:
        importlib.import_module(library)


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; negative for a signal, None if it was stopped.
        seconds: How long it ran.
        growth: Bytes in memory, above those at its start.
        output: What it printed to standard output.
        messages: What it printed to standard error.
        forbidden: What it did that it must not: files changed outside its folders, connections, processes.
    """

    code: int | None
    seconds: float
    growth: int
    output: str
    messages: str
    forbidden: tuple[str, ...]


def command_line() -> None:
    """The command line of aptvit."""
    from aptvit.cli import main

    main()


def run(
    words: Sequence[str],
    folder: Path,
    seconds: float = MAX_SECONDS,
    main: Callable[[], object] = command_line,
    signals: Sequence[tuple[float, int]] = (),
) -> Ended:
    """Run ``aptvit WORDS`` in a folder; it may write to ``out``, ``tmp`` and ``home`` in it.

    Args:
        words: Words of the command line.
        folder: Working folder.
        seconds: After this time it is stopped.
        main: What is run.
        signals: Seconds after the start and numbers of signals that its group is sent, in order of time.
    """
    for name in ("tmp", "home", "log"):
        (folder / name).mkdir(exist_ok=True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(words, folder, main)
    peak = base = _resident(child)
    status, usage, waiting = None, None, list(signals)
    while time.monotonic() - started < seconds and peak - base <= MAX_GROWTH:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if waiting and time.monotonic() - started >= waiting[0][0]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, waiting.pop(0)[1])
        peak = max(peak, _resident(child))
        time.sleep(0.002 if waiting else 0.01)
    else:
        status = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        _, _, usage = os.wait4(child, 0)
    assert usage is not None
    growth = max(peak, usage.ru_maxrss * 1024) - base
    code = None if status is None else os.waitstatus_to_exitcode(status)
    texts = [(folder / "log" / name).read_text(errors="replace") for name in ("out", "err", "forbidden")]
    return Ended(code, time.monotonic() - started, growth, texts[0], texts[1], tuple(texts[2].splitlines()))


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _child(words: Sequence[str], folder: Path, main: Callable[[], object]) -> None:
    """Never returns."""
    code = 70
    try:
        os.setsid()
        (folder / "log" / "forbidden").touch()
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / "log" / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="backslashreplace") for number in (1, 2))
        os.chdir(folder)
        for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "HF_HOME"):
            os.environ[name] = str(folder / "home")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "home")
        os.environ["TMPDIR"], tempfile.tempdir = str(folder / "tmp"), None
        sys.dont_write_bytecode = True
        sys.argv = ["aptvit", *words]
        # Far above the limit: an allocation at once must fail before the machine is out of memory.
        limit = MAX_GROWTH * 5 + int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.addaudithook(_Watch(folder))
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class _Watch:
    """An audit hook that notes changes outside of a folder, connections and processes, and refuses the latter two."""

    def __init__(self, folder: Path) -> None:
        self.allowed = tuple(f"{(folder / name).resolve()}/" for name in ("out", "tmp", "home", "../numba"))
        self.folders = tuple(place[:-1] for place in self.allowed)
        self.log = os.open(folder / "log" / "forbidden", os.O_WRONLY | os.O_APPEND)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & _WRITES:
            self._check(event, args[0])
        elif event in _CHANGES:
            for path, folder in _CHANGES[event]:
                self._check(event, args[path], args[folder] if folder is not None else -1)
        elif event in _NETWORK and not (event == "socket.connect" and isinstance(args[1], (str, bytes))):
            self._note(f"{event} {args[-1] if event == 'socket.connect' else args[0]}")
            raise ConnectionRefusedError("no network in trials")
        elif event in _PROCESSES:
            self._note(f"{event} {args[0]!r}")

    def _check(self, event: str, path: Any, folder: int = -1) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        place = Path(os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()) / os.fsdecode(path)
        place = place.parent.resolve() / place.name
        if not str(place).startswith((*self.allowed, "/dev/", "/proc/")) and str(place) not in self.folders:
            self._note(f"{event} {str(place)!r}")

    def _note(self, line: str) -> None:
        os.write(self.log, (" ".join(line.split()) + "\n").encode(errors="backslashreplace"))


@contextlib.contextmanager
def listening() -> Iterator[tuple[str, list[Any]]]:
    """The URL of a server on this machine, and the list of who connected to it."""
    visitors: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, address = server.accept()
                    visitors.append(address)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", visitors


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
