from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import aptvit

transformers = pytest.importorskip("transformers")

NOTHING, SOME = (-1.0,), (5.0,)
PROMPTS = ["USER : <image> what is this ? ASSISTANT :", "USER : one <image> two <image> ? ASSISTANT :"]
PROMPTS += ["USER : yes no ? ASSISTANT :", "<image>"]


@pytest.fixture
def pictures() -> list[np.ndarray]:
    """Four pictures for the prompts: rather smooth, busy, half and half, smooth."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    noise[0, 16:] = 90
    noise[2, :, :32] = 200
    noise[3] = 30
    return list(noise)


@pytest.fixture
def pair(make_llava: Any, make_processor: Any) -> tuple[Any, Any]:
    return make_llava(), make_processor()


def counts_of(inputs: Any) -> list[int]:
    return (inputs["input_ids"] == 4).sum(1).tolist()


def until_the_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


def visual_rows(out: Any) -> torch.Tensor:
    """What the language model read of all pictures, one tensor or, from transformers 5.24 on, one for each picture."""
    rows = out.image_hidden_states
    return (rows if isinstance(rows, torch.Tensor) else torch.cat([one.flatten() for one in rows])).flatten()


@pytest.mark.parametrize("layer", [-2, -1, 1, [1, -2]])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_with_nothing_merged_it_is_the_host(
    make_llava: Any, make_processor: Any, pictures: list, layer: Any, strategy: str
) -> None:
    host = make_llava(vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    processor = make_processor(vision_feature_select_strategy=strategy)
    model, counting = aptvit.vlm.adapt_llava(host, processor, thresholds=NOTHING)
    reference = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    actual = counting(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    assert set(actual) - set(reference) == {"patch_scales"}
    for key in reference:
        assert torch.equal(actual[key], reference[key])
    with torch.no_grad():
        expected = host(**reference)
        for inputs in (actual, reference):  # with the processor's decision, and scored by the model
            torch.testing.assert_close(model(**inputs).logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(visual_rows(model(**actual)), visual_rows(expected), rtol=1e-5, atol=1e-5)
        assert torch.equal(
            model.generate(**actual, max_new_tokens=6, do_sample=False),
            host.generate(**reference, max_new_tokens=6, do_sample=False),
        )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_a_batch_is_answered_as_its_prompts_alone(pair: tuple, pictures: list, options: dict) -> None:
    model, processor = aptvit.vlm.adapt_llava(*pair, thresholds=SOME)
    expected = {"max_new_tokens": 5, "do_sample": False, **options}
    joint = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    assert counts_of(joint) == [28, 64 + 40, 0, 16]
    answers = model.generate(**joint, **expected)[:, joint["input_ids"].shape[1] :]
    rows = len(answers) // len(PROMPTS)
    for number, (prompt, its) in enumerate(zip(PROMPTS, ([0], [1, 2], [], [3]), strict=True)):
        images = [pictures[i] for i in its] or None
        separate = processor(images=images, text=[prompt], return_tensors="pt")
        answer = model.generate(**separate, **expected)[:, separate["input_ids"].shape[1] :]
        for one, other in zip(answers[number * rows : (number + 1) * rows].tolist(), answer.tolist(), strict=True):
            assert [token for token in one if token] == [token for token in other if token]


def test_features_are_those_of_the_tower_in_raster_order(pair: tuple, pictures: list) -> None:
    host, _ = pair
    model, processor = aptvit.vlm.adapt_llava(*pair, thresholds=SOME)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], patch_scales=inputs["patch_scales"]).pooler_output
        tower = aptvit.adapt(host.model.vision_tower, thresholds=SOME, processor=processor)
        for number, rows in enumerate(features):
            out = tower(inputs["pixel_values"][number][None], output_hidden_states=True)
            expected = host.model.multi_modal_projector(out.hidden_states[-2][0, 1:])
            assert (rows - expected).abs().max() <= 1e-5 * expected.abs().max()
            corners = [(y, x) for y, x, _ in out.layout.patches(0).tolist()]
            assert corners == sorted(corners) and len(corners) == len(rows)


def test_blocks_after_the_feature_layer_do_not_run(pair: tuple, pictures: list) -> None:
    model, processor = aptvit.vlm.adapt_llava(*pair, thresholds=SOME)
    inputs = processor(images=pictures[:1], text=PROMPTS[:1], return_tensors="pt")
    ran = []
    for number, block in enumerate(model.vision.adapter.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    model(**inputs)
    assert ran == [0, 1]  # of three; the configuration reads the last but one


def test_training_ignores_visual_tokens(pair: tuple, pictures: list) -> None:
    model, processor = aptvit.vlm.adapt_llava(*pair, thresholds=SOME)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    out = model(**inputs, labels=labels)
    target = labels[:, 1:].masked_fill(labels[:, 1:] == 4, -100)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), target.flatten())
    torch.testing.assert_close(out.loss, expected)
    trained = aptvit.vlm.train_only(model.train(), "projector")
    assert {id(p) for p in trained} == {id(p) for p in model.model.multi_modal_projector.parameters()}
    model.gradient_checkpointing_enable()
    model(**inputs, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in model.model.language_model.parameters())


def test_checkpointing_has_the_same_gradients(pair: tuple, pictures: list) -> None:
    model, processor = aptvit.vlm.adapt_llava(*pair, thresholds=SOME)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    aptvit.vlm.train_only(model.train(), "new", "tower")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_thresholds_of_the_model_are_those_of_the_processor(pair: tuple, pictures: list) -> None:
    model, processor = aptvit.vlm.adapt_llava(*pair, keep=0.5)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    assert counts_of(inputs) == [31, 62, 0, 31]
    aptvit.calibrate(model.vision, inputs["pixel_values"], keep=0.75)
    model.vision.thresholds = (-1.0,)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    assert counts_of(inputs) == [64, 128, 0, 64]


def test_hosts_stay_as_they_are(pair: tuple, pictures: list) -> None:
    host, own = pair
    before = {name: id(parameter) for name, parameter in host.named_parameters()}
    model, processor = aptvit.vlm.adapt_llava(host, own, thresholds=SOME)
    assert {name: id(parameter) for name, parameter in host.named_parameters()} == before
    mine = dict(model.named_parameters())
    assert all(id(mine[name]) == its for name, its in before.items())
    assert type(host) is transformers.LlavaForConditionalGeneration and type(own) is transformers.LlavaProcessor
    assert "patch_scales" not in own(images=pictures[0], text=PROMPTS[0], return_tensors="pt")
    copied = copy.deepcopy(model)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    assert torch.equal(copied(**inputs).logits, model(**inputs).logits)


def test_saved_and_loaded(pair: tuple, pictures: list, tmp_path: Path) -> None:
    model, processor = aptvit.vlm.adapt_llava(*pair, thresholds=SOME)
    torch.nn.init.normal_(model.vision.coarse_embed.linear.weight, std=0.5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reading = aptvit.vlm.from_pretrained(tmp_path)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    same = reading(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    for key in inputs:
        assert torch.equal(inputs[key], same[key])
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        plain, loading = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        expected = pair[1](images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
        torch.testing.assert_close(plain(**expected).logits, pair[0](**expected).logits)
    with pytest.raises(ValueError, match=r"no aptvit\.json"):
        aptvit.vlm.from_pretrained(tmp_path / "elsewhere")


def test_wrong_counts_are_named(pair: tuple, pictures: list) -> None:
    model, processor = aptvit.vlm.adapt_llava(*pair, thresholds=SOME)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    uniform = pair[1](images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=r"hold \[64, 128, 0, 64\] image tokens, the images have \[28, 64, 40, 16\]"):
        model(**uniform)
    with pytest.raises(ValueError, match="image tokens"):
        model.generate(**uniform, max_new_tokens=2)
    swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(0), "patch_scales": inputs["patch_scales"].flip(0)}
    with pytest.raises(ValueError, match="image tokens"):  # the same sum, but not the same pictures
        model(**swapped)
    with pytest.raises(ValueError, match="do not belong to pixel_values"):
        model(**{**inputs, "patch_scales": inputs["patch_scales"][:, :4]})
    with pytest.raises(ValueError, match="do not tile"):
        model(**{**inputs, "patch_scales": inputs["patch_scales"] + 1})


def test_processors_of_other_models_are_named(make_llava: Any, make_processor: Any) -> None:
    host = make_llava()
    wrong = {
        "patch_size": (make_processor(patch_size=14), "patch_size is 14, the model's 8"),
        "strategy": (make_processor(vision_feature_select_strategy="full"), "'full', the model's 'default'"),
        "class token": (make_processor(num_additional_image_tokens=0), "num_additional_image_tokens is 0"),
        "no processor": (make_processor().tokenizer, "load the model's own with AutoProcessor"),
    }
    large = make_processor()
    large.image_processor.crop_size = {"height": 336, "width": 336}
    wrong["size"] = (large, "made for 64 pixels")
    for processor, message in wrong.values():
        with pytest.raises(ValueError, match=message):
            aptvit.vlm.adapt_llava(host, processor)
    with pytest.raises(ValueError, match="is not LlavaForConditionalGeneration"):
        aptvit.vlm.adapt_llava(host.model.language_model, make_processor())
    with pytest.raises(ValueError, match=r"use aptvit\.vlm\.adapt\(model, processor\)"):
        aptvit.adapt(host)
    model, processor = aptvit.vlm.adapt_llava(host, make_processor())
    with pytest.raises(ValueError, match="adaptive already"):
        aptvit.vlm.adapt_llava(model, make_processor())
    with pytest.raises(ValueError, match="adaptive already"):
        aptvit.vlm.adapt_llava(host, processor)
    with pytest.raises(ValueError, match="no part of the model"):
        aptvit.vlm.train_only(model, "projektor")


def test_other_towers(make_processor: Any, make_llava: Any, pictures: list) -> None:
    base = make_llava().config.to_dict()
    vision = {**base["vision_config"], "model_type": "siglip_vision_model"}
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=base["text_config"], image_token_id=4, vision_feature_select_strategy="full"
    )
    host = transformers.LlavaForConditionalGeneration(config).eval()
    own = make_processor(vision_feature_select_strategy="full", num_additional_image_tokens=0)
    model, processor = aptvit.vlm.adapt_llava(host, own, thresholds=NOTHING)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = host(**own(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        model.vision.thresholds = SOME
        inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
        assert counts_of(inputs) == [28, 104, 0, 16]
        assert isinstance(model(**inputs).logits, Tensor)
