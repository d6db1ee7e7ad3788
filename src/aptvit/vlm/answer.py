"""Answer a question about an image, and return the patches of the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from aptvit.files.images import open_image
from aptvit.vlm.llava import LlavaForConditionalGeneration, LlavaProcessor, adapt_llava, from_pretrained, is_adaptive
from aptvit.vlm.prompts import make_prompt

__all__ = ["Answer", "answer_question", "load_llava"]


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer, with the visual tokens of the image.

    Attributes:
        answer: The model's answer.
        uniform_answer: The model's answer with nothing merged, if requested.
        visual_tokens: Number of visual tokens of the image.
        visual_tokens_uniform: Number of visual tokens with nothing merged.
        pixels: (H, W, 3) uint8 image after the processor's resizing and cropping.
        patches: (n, 3) rows (y, x, size) in pixels, which tile the image.
        patch_size: Side of a base patch in pixels.
    """

    answer: str
    uniform_answer: str | None
    visual_tokens: int
    visual_tokens_uniform: int
    pixels: np.ndarray
    patches: np.ndarray
    patch_size: int

    def to_dict(self) -> dict[str, Any]:
        """The answers and the numbers of tokens, for JSON."""
        return {
            "answer": self.answer,
            "uniform_answer": self.uniform_answer,
            "visual_tokens": self.visual_tokens,
            "visual_tokens_uniform": self.visual_tokens_uniform,
        }


def load_llava(
    name: str, options: dict[str, Any], device: str, dtype: str = "auto"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a LLaVA-1.5, and adapt it if it is not adaptive yet.

    Args:
        name: A folder, or the name of a repository on the hub.
        options: As for `adapt_llava`. Without options an adaptive model keeps its own, and other models get the paper's
            threshold of 5.75 bits.
        device: Device of the model.
        dtype: Type of the weights; "auto" for that of the files.

    Raises:
        ValueError: If there is no such model.
    """
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ValueError(
            f"cannot load {name}: there is no such folder, and it is no repository of the hub (owner/name)"
        )
    try:
        if is_adaptive(name):
            model, processor = from_pretrained(name, dtype=dtype)
            for option, value in options.items():
                setattr(model.vision, option, value)
        else:
            host = transformers.LlavaForConditionalGeneration.from_pretrained(name, dtype=dtype)
            host_processor = transformers.AutoProcessor.from_pretrained(name)
            model, processor = adapt_llava(host, host_processor, **(options or {"thresholds": (5.75,)}))
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot load {name}: {reason}; give a folder, or a LLaVA-1.5 of the hub") from error
    return model.eval().to(device), processor


@torch.inference_mode()
def answer_question(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image: Path,
    question: str,
    max_new_tokens: int = 64,
    with_uniform: bool = False,
) -> Answer:
    """Answer a question about an image.

    Args:
        model: From `load_llava`.
        processor: From `load_llava`.
        image: The image file.
        question: The question.
        max_new_tokens: Most tokens of the answer.
        with_uniform: Answer also with nothing merged.

    Raises:
        ValueError: If the image cannot be read.
    """
    inputs = processor(images=open_image(image), text=[make_prompt(processor, question)], return_tensors="pt")
    answer = _generate(model, processor, inputs, max_new_tokens)
    layout = model.model.layout(inputs["pixel_values"], inputs["patch_scales"])
    pixels = _as_pixels(model, inputs["pixel_values"][0])
    rows, cols = layout.grid_sizes[0]
    uniform = None
    if with_uniform:
        before = model.vision.budget
        try:
            model.vision.thresholds = (-1.0,) * (model.vision.num_scales - 1)
            uniform_inputs = processor(
                images=open_image(image), text=[make_prompt(processor, question)], return_tensors="pt"
            )
            uniform = _generate(model, processor, uniform_inputs, max_new_tokens)
        finally:
            model.vision.budget = before
    patches = layout.patches(0).numpy()
    return Answer(answer, uniform, layout.num_patches, rows * cols, pixels, patches, model.vision.patch_size)


def _generate(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    inputs = inputs.to(model.device, model.dtype)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def _as_pixels(model: Any, image: Tensor) -> Any:
    """(C, H, W) normalised -> (H, W, C) uint8"""
    mean, std = torch.tensor([model.vision.patchifier.mean, model.vision.patchifier.std])[:, :, None, None]
    pixels = (image.float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
