"""LLaVA-1.5-7B with fewer visual tokens: the vision tower, and the prefill of the language model, apart.

    python benchmarks/llava.py                                               # CPU; 2 of the language model's 32 layers
    python benchmarks/llava.py --device cuda --dtype float16 --layers 32 --batch 16 --rounds 10

Shapes of the 7B model, random weights, real photos: the time does not depend on the weights. From normalised images
in memory to projected features, scoring and patchifying included; then from embeddings to the first token. Both sides
run in one process, in turn. Writes results/llava-<device>.{json,md}.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models
from torch import Tensor

import aptvit
from aptvit.files.images import find_images, open_image
from aptvit.files.sample_photos import sample_photos
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.operations import count_flops, countable_attention
from aptvit.measuring.record import plain
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.measuring.tables import Columns, markdown_page, markdown_table
from aptvit.storage.writing import write_json

RESULTS = Path(__file__).parent / "results"
TEXT = 48  # tokens of a question
IMAGE = 32000  # id of the image token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path, help="scikit-image's and scikit-learn's unless some are given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=2, help="of the language model, of 32")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--prompts", type=int, default=2, help="of one picture each, in a prefill")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.67, 0.5])
    parser.add_argument("--thresholds", type=float, nargs="*", default=[5.75])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    environment = prepare_machine(options.device)
    host, processor = build(options.layers, options.device, getattr(torch, options.dtype))
    model, _ = aptvit.vlm.adapt_llava(host, processor)
    pixels = read(processor, options.photos, options.batch).to(host.device, host.dtype)
    wishes = [{"thresholds": (-1.0,)}, *({"keep": keep} for keep in options.keep)]
    wishes += [{"thresholds": (threshold,)} for threshold in options.thresholds]
    with torch.inference_mode():
        rows = [*tower(host, model, pixels, wishes, options.rounds)]
        rows += prefill(model, pixels[: options.prompts], wishes, options.rounds, options.layers)
    record = {
        "command": shlex.join(["python", "benchmarks/llava.py", *sys.argv[1:]]),
        "environment": {**environment, "transformers": transformers.__version__},
        "batch": options.batch,
        "prompts": options.prompts,
        "layers": options.layers,
        "dtype": options.dtype,
        "rows": rows,
    }
    name = f"llava-{torch.device(options.device).type}"
    write_json(options.out / f"{name}.json", record, indent=1)
    (options.out / f"{name}.md").write_text(as_markdown(record), encoding="utf-8")
    print(as_markdown(record))


def build(layers: int, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """LLaVA-1.5-7B with random weights, and its processor."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    text = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    text |= {"num_hidden_layers": layers, "vocab_size": 32064}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    with torch.device(device):
        model = transformers.LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
    vocabulary = {f"word{i}": i for i in range(IMAGE)} | {"<image>": IMAGE}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)))
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    images = transformers.CLIPImageProcessor(**sizes)
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return model, transformers.LlavaProcessor(images, tokenizer, **options)


def read(processor: Any, photos: list[Path], count: int) -> Tensor:
    """(count, 3, 336, 336) as the processor normalises them."""
    if photos:
        opened = [np.asarray(open_image(path)) for path in find_images(photos)[:count]]
    else:
        opened = list(sample_photos().values())
    images = [Image.fromarray(pixels) for pixels in opened]
    images = (images * (count // len(images) + 1))[:count]
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def set_wish(model: Any, wish: dict[str, Any]) -> None:
    for name, value in wish.items():
        setattr(model.vision, name, value)


def tower(host: Any, model: Any, pixels: Tensor, wishes: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """From images to projected features."""

    def adaptive(wish: dict[str, Any]) -> Any:
        set_wish(model, wish)
        return model.model.get_image_features(pixels)

    runs = [partial(host.model.get_image_features, pixels), *(partial(adaptive, wish) for wish in wishes)]
    flops, tokens = [], []
    with countable_attention(model.vision, pixels.device):
        for run in runs:
            flops.append(count_flops(run))
            tokens.append(sum(map(len, run().pooler_output)) / len(pixels))
    seconds = interleaved(runs, rounds, pixels.device)
    # The baseline is the uniform tower that stops where it is read; transformers 5.23's own runs one block more.
    names = ["transformers", *map(str, wishes)]
    return [
        _row("tower", name, seconds[i], seconds[1], flops[i], flops[1], tokens[i], len(pixels))
        for i, name in enumerate(names)
    ]


def prefill(model: Any, pixels: Tensor, wishes: list[dict[str, Any]], rounds: int, layers: int) -> list[dict[str, Any]]:
    """From embeddings to the logits of the first token, all prompts of one length: that of the longest."""
    runs, tokens = [], []
    width = model.config.text_config.hidden_size
    for wish in wishes:
        set_wish(model, wish)
        lengths = [length - 1 + TEXT for length in model.vision.layout(pixels).seqlens]
        longest = max(lengths)
        embeds = torch.randn(len(pixels), longest, width, device=pixels.device, dtype=pixels.dtype)
        mask = (
            torch.arange(longest, device=pixels.device)
            >= longest - torch.tensor(lengths, device=pixels.device)[:, None]
        )
        arguments = {"inputs_embeds": embeds, "attention_mask": mask.long(), "logits_to_keep": 1, "use_cache": True}
        runs.append(partial(model, **arguments))
        tokens.append(sum(lengths) / len(lengths) - TEXT)
    flops = [count_flops(run) for run in runs]
    seconds = interleaved(runs, rounds, pixels.device)
    part = f"prefill, {layers} of 32 layers" if layers < 32 else "prefill"
    return [
        _row(part, str(wish), seconds[i], seconds[0], flops[i], flops[0], tokens[i], len(pixels))
        for i, wish in enumerate(wishes)
    ]


def _row(
    part: str,
    name: str,
    seconds: list[float],
    base: list[float],
    flops: int,
    base_flops: int,
    tokens: float,
    count: int,
) -> dict[str, Any]:
    faster, ratio = Ratio.of_rounds(base, seconds), base_flops / flops
    return {
        "part": part,
        "method": "uniform" if name == "{'thresholds': (-1.0,)}" else name.strip("{}").replace("'", ""),
        "visual_tokens": tokens,
        "images_per_second": count / statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "speedup": plain(faster),
        "flop_ratio": ratio,
        "eta": faster.median / ratio,
    }


def as_markdown(record: dict[str, Any]) -> str:
    about = (
        f"{record['dtype']}, random weights, {record['batch']} photos in the tower, {record['prompts']} prompts of "
        f"one photo and {TEXT} words each in the prefill. Uniform is the same model with nothing merged: the tower "
        "stops at the block that is read. `transformers` is the host's `get_image_features`. Prompts of different "
        "lengths are padded to the longest, as generation does."
    )
    columns: Columns = (
        ("part", lambda row: row["part"]),
        ("patches", lambda row: row["method"]),
        ("visual tokens", lambda row: f"{row['visual_tokens']:.0f}"),
        ("images/s", lambda row: f"{row['images_per_second']:.2f}"),
        ("speed-up (rounds)", lambda row: f"{Ratio(**row['speedup']):.2f}"),
        ("FLOP ratio", lambda row: f"{row['flop_ratio']:.2f}"),
        ("eta", lambda row: f"{row['eta']:.2f}"),
    )
    table = markdown_table(columns, record["rows"])
    return markdown_page("LLaVA-1.5-7B: tower and prefill", [record["command"]], record["environment"], about, table)


if __name__ == "__main__":
    main()
