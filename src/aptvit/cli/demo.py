"""`aptvit demo`: serve a local web page that shows patches, tokens, time and predictions."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from aptvit.cli.options import (
    MODEL,
    CheckpointOption,
    DeviceOption,
    ImgSizeOption,
    JsonOption,
    ModelOption,
    check_file,
    checked_device,
    print_message,
    require,
)


def demo(
    model: ModelOption = MODEL,
    checkpoint: CheckpointOption = None,
    img_size: ImgSizeOption = None,
    device: DeviceOption = None,
    host: Annotated[
        str, typer.Option(help="Address to bind to. With the default, only this machine can open the page.")
    ] = "127.0.0.1",
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

    from aptvit.demo.demo_model import DemoModel
    from aptvit.demo.page import serve

    demo_model = DemoModel(model, checkpoint, img_size, checked_device(device))
    with serve(demo_model, host, port, browser) as address:
        if as_json:
            print(json.dumps({"model": demo_model.name, "address": address}), flush=True)
        else:
            print(f"{demo_model.name} is at {address} until you press Ctrl+C", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print_message("closed; uploaded files were deleted")
