"""`aptvit demo`: a page to play with, on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from aptvit.cli.options import checked_device


def demo(
    model: Annotated[
        str, typer.Option(help="timm's name of the model, or the folder of a training.")
    ] = "vit_small_patch16_384",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load instead of timm's own.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the model's input in pixels.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to bind to: others see the page only if this is not loopback.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; the first free one from 7860 on.", min=1, max=65535)] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Open a page to play with: your photo, its patches, tokens, time and answers.

    Example: `aptvit demo --model vit_small_patch16_384`
    """
    from aptvit.demo.page import serve
    from aptvit.demo.player import Player

    player = Player(model, checkpoint, img_size, checked_device(device))
    with serve(player, host, port, browser) as address:
        print(f"{player.name} is at {address} until you press Ctrl+C", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print("closed; nothing was kept")
