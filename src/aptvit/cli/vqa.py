"""`aptvit vqa`: a question about a picture, answered by LLaVA on fewer visual tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from aptvit.cli.options import AsJson, as_numbers, checked_device


def vqa(
    photo: Annotated[Path, typer.Argument(help="The picture.", metavar="PHOTO")],
    question: Annotated[str, typer.Argument(help="About it.")],
    model: Annotated[str, typer.Option(help="A LLaVA-1.5: a folder, or a repository on the hub.")],
    thresholds: Annotated[
        str | None, typer.Option(help="In bits, from fine to coarse; 5.75 as in the paper by default.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Instead: share of the visual tokens to keep.")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Ask once more with nothing merged.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="The answer's length at most.", min=1)] = 64,
    out: Annotated[Path, typer.Option(help="File of the picture with its patches.")] = Path("vqa.png"),
    device: Annotated[str | None, typer.Option(help="Where to run; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Ask LLaVA about a picture, and see which patches it read.

    Example: `aptvit vqa cat.jpg "What is on the table?" --model llava-hf/llava-1.5-7b-hf`
    """
    if thresholds is not None and keep is not None:
        raise ValueError(f"--thresholds {thresholds} and --keep {keep}: give one, each decides what is merged")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype} is not known: use auto, float32, bfloat16 or float16")
    try:
        from aptvit.vlm.answer import answer_question, load_llava
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ValueError("vqa needs transformers: pip install 'aptvit[hf]'") from error
    from aptvit.report.drawing import draw_patches, save_png

    wish = {"thresholds": as_numbers(thresholds), "keep": keep}
    options = {name: value for name, value in wish.items() if value is not None}
    llava, processor = load_llava(model, options, checked_device(device), dtype)
    answer = answer_question(llava, processor, photo, question, max_new_tokens, uniform)
    picture = save_png(draw_patches(answer.pixels, answer.patches, answer.patch_size), out)
    if as_json:
        print(json.dumps({**answer.to_dict(), "picture": str(picture)}, indent=2))
        return
    print(answer.answer)
    if answer.uniform_answer is not None:
        print(f"with all tokens: {answer.uniform_answer}")
    share = answer.visual_tokens / answer.visual_tokens_uniform
    print(f"{picture}  {answer.visual_tokens} of {answer.visual_tokens_uniform} visual tokens ({share:.0%})")
