"""LLaVA small enough for tests, with a language of few words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

WORDS = ["what", "is", "in", "this", "picture", "?", "one", "two", "a", "cat", "USER", "ASSISTANT", ":", "yes", "no"]


def make_processor(**options: Any) -> Any:
    """A LLaVA processor for pictures of 64 x 64 pixels and a language of few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    known = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer, **{**known, **options})


def make_llava(**options: Any) -> Any:
    """LLaVA with a CLIP tower of three blocks and a language model of two, no parameter zero, one or tiny."""
    vision = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    vision |= {"image_size": 64, "patch_size": 8, "model_type": "clip_vision_model"}
    text = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text |= {"vocab_size": 5 + len(WORDS), "model_type": "llama", "num_key_value_heads": 4, "pad_token_id": 0}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, **options)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
            else:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    model.generation_config.pad_token_id = 0
    return model
