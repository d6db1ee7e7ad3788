"""Vision language models with fewer visual tokens for smooth regions of images.

model, processor = aptvit.vlm.adapt_llava(model, processor, thresholds=(5.75,))
out = model.generate(**processor(images=images, text=prompts, padding=True, return_tensors="pt"))

May import `aptvit.api` and all below it.
"""

from aptvit.vlm.llava import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    adapt,
    adapt_llava,
    from_pretrained,
    train_only,
)

__all__ = ["LlavaForConditionalGeneration", "LlavaProcessor", "adapt", "adapt_llava", "from_pretrained", "train_only"]
