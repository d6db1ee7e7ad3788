"""`aptvit vqa`: a question about an image, answered by LLaVA on fewer visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from aptvit.cli.options import (
    AsJson,
    Device,
    Keep,
    Out,
    Thresholds,
    as_numbers,
    check_budget,
    check_writable,
    checked_device,
    print_json,
    print_line,
    require,
)


def vqa(
    image: Annotated[Path, typer.Argument(help="The image.", metavar="IMAGE")],
    question: Annotated[str, typer.Argument(help="About the image.")],
    llava: Annotated[str, typer.Option(help="A LLaVA-1.5: a folder, or a repository on the hub.", metavar="NAME")],
    thresholds: Thresholds = None,
    keep: Keep = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Ask once more with merging disabled.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Largest length of the answer in tokens.", min=1)] = 64,
    weights_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type of the weights in memory; auto is that of the files."),
    ] = "auto",
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Ask LLaVA about an image, and see which patches it read.

    Without --keep and --thresholds an adaptive model keeps its own; others get the paper's threshold of 5.75 bits.

    Example: `aptvit vqa cat.jpg "What is on the table?" --llava llava-hf/llava-1.5-7b-hf`
    """
    require("hf", "transformers")
    check_budget(thresholds, keep)
    if not image.is_file():
        raise ValueError(f"{image} does not exist: name an image file")
    folder = out or Path("vqa")
    check_writable(folder)

    from aptvit.report.drawing import draw_patches, save_png
    from aptvit.vlm.answer import answer_question, load_llava

    wish = {"thresholds": as_numbers(thresholds), "keep": keep}
    options = {name: value for name, value in wish.items() if value is not None}
    model, processor = load_llava(llava, options, checked_device(device), weights_dtype)
    answer = answer_question(model, processor, image, question, max_new_tokens, uniform)
    drawing = save_png(draw_patches(answer.pixels, answer.patches, answer.patch_size), folder / f"{image.stem}.png")
    if as_json:
        print_json({**answer.to_dict(), "drawing": str(drawing)})
        return
    print_line(answer.answer)
    if answer.uniform_answer is not None:
        print_line(f"with all tokens: {answer.uniform_answer}")
    share = answer.visual_tokens / answer.visual_tokens_uniform
    print_line(f"{drawing}  {answer.visual_tokens} of {answer.visual_tokens_uniform} visual tokens ({share:.0%})")
