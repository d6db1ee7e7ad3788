"""Prompts for questions about images, in the format of LLaVA's training."""

from __future__ import annotations

from typing import Any

__all__ = ["make_prompt"]

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def make_prompt(processor: Any, question: str, num_images: int = 1) -> str:
    """The prompt of one question, by the processor's chat template if it has one, else by LLaVA-1.5's.

    Args:
        processor: A LLaVA processor.
        question: The question; image tokens in it place its images, otherwise images come first.
        num_images: Number of images.
    """
    placed = processor.image_token in question
    if processor.chat_template is None:
        images = "" if placed else f"{processor.image_token}\n" * num_images
        return f"{_SYSTEM} USER: {images}{question} ASSISTANT:"
    images_first = [] if placed else [{"type": "image"}] * num_images
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*images_first, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)
