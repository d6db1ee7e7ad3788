"""`aptvit demo`: a page to play with, on this machine."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from aptvit.cli.options import (
    MODEL,
    AsJson,
    Checkpoint,
    Device,
    ImgSize,
    Model,
    check_file,
    checked_device,
    require,
    say,
)


def demo(
    model: Model = MODEL,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    device: Device = None,
    host: Annotated[
        str, typer.Option(help="Address to bind to: others see the page only if this is not loopback.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; the first free one from 7860 on.", min=1, max=65535)] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    as_json: AsJson = False,
) -> None:
    """Open a page to play with: your image, its patches, tokens, time and answers.

    Example: `aptvit demo --model vit_small_patch16_384`
    """
    require("demo", "gradio", "skimage", "sklearn")
    check_file("checkpoint", checkpoint)

    from aptvit.demo.page import serve
    from aptvit.demo.player import Player

    player = Player(model, checkpoint, img_size, checked_device(device))
    with serve(player, host, port, browser) as address:
        if as_json:
            print(json.dumps({"model": player.name, "address": address}), flush=True)
        else:
            print(f"{player.name} is at {address} until you press Ctrl+C", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            say("closed; nothing was kept")
