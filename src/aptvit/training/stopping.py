"""Signals that stop a training: it finishes the update, writes a checkpoint and exits.

Service managers and schedulers send a signal to all processes of a group, and torchrun passes it on to those that it
started, so a process may get it twice, and workers get it too.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals", "Stopped", "ignore_signals", "signals_held"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
_SECONDS = 1.0  # in which a second Ctrl-C is the first, passed on by torchrun


class Stopped(Exception):
    """A request to stop, raised where there is nothing to save."""


def ignore_signals() -> None:
    """Ignore the signals that stop a training, in a worker: it ends with the process that started it.

    That process ends its workers by SIGTERM, too, where they do not end by themselves, as after an error. Where the
    sender cannot be told (macOS), SIGTERM ends a worker in any case.
    """
    for number in _SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # in all threads: that below inherits it
        threading.Thread(target=_end_on_request, args=(os.getppid(),), daemon=True).start()
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number for number in _SIGNALS if number != signal.SIGTERM])


def _end_on_request(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def signals_held() -> Iterator[None]:
    """Context in which workers are started: signals wait until it ends, in workers until they ignore them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignals:
    """Context in which SIGTERM, SIGHUP and Ctrl-C are stored as a request.

    A second Ctrl-C, a second later or more, raises KeyboardInterrupt. Signals that are ignored stay ignored, as SIGHUP
    by nohup.

    Attributes:
        requested: Whether a signal requested to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            numbers = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._store_request) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _store_request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._requested_at = True, now
        elif number == signal.SIGINT and now - self._requested_at >= _SECONDS:
            raise KeyboardInterrupt
