"""`aptvit vqa`: ask LLaVA a question about an image, with fewer visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from aptvit.cli.checks import as_numbers, check_budget, check_writable, checked_device, require
from aptvit.cli.options import DeviceOption, JsonOption, KeepOption, OutOption, ThresholdsOption
from aptvit.cli.output import print_json, print_line


def vqa(
    image: Annotated[Path, typer.Argument(help="Image file.", metavar="IMAGE")],
    question: Annotated[str, typer.Argument(help="Question about the image.")],
    llava: Annotated[
        str, typer.Option(help="A LLaVA-1.5 model: a folder, or a repository of the Hugging Face hub.", metavar="NAME")
    ],
    thresholds: ThresholdsOption = None,
    keep: KeepOption = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Also answer with all visual tokens.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens of the answer.", min=1)] = 64,
    weights_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Floating-point type of the weights in memory; auto for that of the files."),
    ] = "auto",
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask LLaVA a question about an image, and draw the patches that it used.

    Without --keep and --thresholds, an adaptive model keeps its thresholds; other models get the paper's threshold of
    5.75 bits.

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

    values = {"thresholds": as_numbers(thresholds), "keep": keep}
    options = {name: value for name, value in values.items() if value is not None}
    model, processor = load_llava(llava, options, checked_device(device), weights_dtype)
    answer = answer_question(model, processor, image, question, max_new_tokens, uniform)
    drawing = save_png(draw_patches(answer.pixels, answer.patches, answer.patch_size), folder / f"{image.stem}.png")
    if as_json:
        print_json({**answer.to_dict(), "drawing": str(drawing)})
        return
    print_line(answer.answer)
    if answer.uniform_answer is not None:
        print_line(f"with all visual tokens: {answer.uniform_answer}")
    share = answer.visual_tokens / answer.visual_tokens_uniform
    print_line(f"{drawing}  {answer.visual_tokens} of {answer.visual_tokens_uniform} visual tokens ({share:.0%})")
