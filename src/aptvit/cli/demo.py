"""`aptvit demo`: serve a local web page that shows patches, tokens, time and predictions."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from aptvit.cli.checks import as_texts, check_file, checked_device, require
from aptvit.cli.options import (
    MODEL,
    CheckpointOption,
    DeviceOption,
    ImgSizeOption,
    JsonOption,
    ModelOption,
    TextOption,
)
from aptvit.cli.output import print_message


def demo(
    model: ModelOption = MODEL,
    checkpoint: CheckpointOption = None,
    img_size: ImgSizeOption = None,
    text: TextOption = None,
    device: DeviceOption = None,
    host: Annotated[
        str, typer.Option(help="Address to bind to. With the default, only this machine can open the page.")
    ] = "127.0.0.1",
    password: Annotated[
        str | None,
        typer.Option(
            help="Password that browsers ask for, needed where other machines can open the page. Process listings show "
            "options; the environment variable is safer.",
            envvar="APTVIT_DEMO_PASSWORD",
        ),
    ] = None,
    no_password: Annotated[bool, typer.Option("--no-password", help="Let other machines in without one.")] = False,
    port: Annotated[
        int | None, typer.Option(help="Port; by default the first free one from 7860 on.", min=1, max=65535)
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Serve a local web page that shows the patches of your images, the tokens, the time and the predictions.

    Example: `aptvit demo --model vit_small_patch16_384`
    """
    require("demo", "gradio", "skimage", "sklearn")
    check_file("checkpoint", checkpoint)

    from aptvit.demo.access import Access

    access = Access(host, password, no_password)

    from aptvit.demo.demo_model import DemoModel
    from aptvit.demo.server import serve

    demo_model = DemoModel(model, checkpoint, img_size, checked_device(device), access.is_local, as_texts(text))
    with _stop_signals() as received:
        with serve(demo_model, access, port, browser) as address:
            if as_json:
                print(json.dumps({"model": demo_model.name, "address": address}), flush=True)
            else:
                print(f"{demo_model.name} is at {address} until you press Ctrl+C", flush=True)
            received.wait()
        print_message("closed; uploaded files were deleted")
    if received.number != signal.SIGINT:
        raise typer.Exit(128 + received.number)


class _Signals:
    """The first signal that requests to stop; later ones have no effect, so that uploads are deleted."""

    def __init__(self) -> None:
        self.number = 0
        self._event = threading.Event()

    def __call__(self, number: int, _frame: Any) -> None:
        self.number = self.number or number
        self._event.set()

    def wait(self) -> None:
        while not self._event.wait(3600):
            continue


@contextmanager
def _stop_signals() -> Iterator[_Signals]:
    """Take the signals by which terminals, service managers and schedulers stop a process."""
    received = _Signals()
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.signal(number, received) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
