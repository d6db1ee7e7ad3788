from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor

import aptvit
from aptvit.data import predict
from aptvit.hosts.timm import coarse_positions

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}
VIT = {**SIZES, "intermediate_size": 64}
DINO = {**SIZES, "mlp_ratio": 2}
NAFLEX = {**VIT, "num_patches": 64}
del NAFLEX["image_size"]
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 16}
BOTH = {"vision_config": VIT, "text_config": TEXT}

TOWERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTModel", "ViTConfig", VIT),
    "DeiT": ("DeiTModel", "DeiTConfig", VIT),
    "DINOv2": ("Dinov2Model", "Dinov2Config", DINO),
    "DINOv2, SwiGLU": ("Dinov2Model", "Dinov2Config", {**DINO, "use_swiglu_ffn": True}),
    "DINOv2, registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "num_register_tokens": 4}),
    "DINOv3, gated": ("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "use_gated_mlp": True}),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", VIT),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig", VIT),
}
AROUND: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT, classes": ("ViTForImageClassification", "ViTConfig", {**VIT, "num_labels": 7}),
    "DeiT, classes": ("DeiTForImageClassification", "DeiTConfig", {**VIT, "num_labels": 7}),
    "DeiT, teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**VIT, "num_labels": 7}),
    "DINOv2, classes": ("Dinov2ForImageClassification", "Dinov2Config", {**DINO, "num_labels": 7}),
    "DINOv2, registers, classes": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {**DINO, "num_labels": 7},
    ),
    "CLIP, classes": ("CLIPForImageClassification", "CLIPConfig", {**BOTH, "num_labels": 7}),
    "SigLIP, classes": ("SiglipForImageClassification", "SiglipConfig", {**BOTH, "num_labels": 7}),
    "CLIP, projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VIT, "projection_dim": 16}),
}
EVERY = {**TOWERS, **AROUND}


def make(name: str, **options: Any) -> Any:
    """A tower of three blocks for 64 x 64 pixels, with no parameter that is zero, one or tiny."""
    kind, config, values = EVERY[name]
    host = getattr(transformers, kind)(getattr(transformers, config)(**{**values, **options})).eval()
    return perturbed(host)


def perturbed(host: Any) -> Any:
    with torch.no_grad():
        for name, parameter in host.named_parameters():
            if parameter.ndim < 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
            elif "token" in name or "position" in name:
                parameter.normal_(std=0.5)
            elif parameter.numel():
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return host


@pytest.fixture
def pictures() -> Tensor:
    """(3, 3, 64, 64): noise, a quarter and a half of it smooth."""
    images = torch.randn(3, 3, 64, 64)
    images[0, :, :32] = 0.1
    images[1, :, :, :16] = -0.2
    return images


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    if isinstance(theirs, Tensor):
        scale = theirs.abs().max()
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * scale
    elif theirs is not None:
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, tolerance)


@pytest.mark.parametrize("name", EVERY)
def test_with_nothing_merged_it_is_the_host(name: str, pictures: Tensor) -> None:
    host = make(name)
    model = aptvit.adapt(host)
    with torch.no_grad():
        expected = host(pixel_values=pictures, output_hidden_states=True)
        actual = model(pixel_values=pictures, output_hidden_states=True)
    assert expected.hidden_states is not None
    for key, value in expected.items():
        assert_same(actual[key], value)


@pytest.mark.parametrize("name", EVERY)
def test_with_nothing_merged_it_is_the_host_at_other_sizes(name: str) -> None:
    host = make(name)
    model = aptvit.adapt(host)
    images = torch.randn(2, 3, 48, 80)
    own = {} if "DINO" in name else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected, actual = host(pixel_values=images, **own), model(pixel_values=images)
    for key, value in expected.items():
        assert_same(actual[key], value)


@pytest.mark.parametrize("name", EVERY)
def test_images_of_a_batch_do_not_see_each_other(name: str, pictures: Tensor) -> None:
    model = aptvit.adapt(make(name), thresholds=(4.6,))
    mixed = [*pictures, torch.randn(3, 32, 96)]
    layout = model.layout(mixed)
    assert len(set(layout.seqlens)) == 4
    with torch.no_grad():
        joint = model(mixed, output_hidden_states=True)
        apart = [model(image[None], output_hidden_states=True) for image in mixed]
    for key, value in joint.items():
        if key == "layout":
            continue
        if isinstance(value, Tensor):
            assert_same(value, torch.cat([one[key] for one in apart]))
        elif key == "hidden_states":
            for state, rows in enumerate(value):
                assert_same(rows, [one[key][state][0] for one in apart])
        else:
            assert_same(value, [one[key][0] for one in apart])


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_the_host(name: str, pictures: Tensor) -> None:
    host = make(name).train()
    model = aptvit.adapt(host)
    key = {"CLIP, projected": "image_embeds"}.get(name, "pooler_output" if name in TOWERS else "logits")
    gradients = []
    for either in (host, model):
        host.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            either(pixel_values=pictures)[key].square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in host.named_parameters() if p.grad is not None and p.numel()})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-5 * largest


def as_timm(host: Any) -> Any:
    """The same Vision Transformer, built by timm."""
    vit = timm.models.VisionTransformer(64, 8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2, num_classes=7).eval()
    state = {
        "cls_token": host.vit.embeddings.cls_token,
        "pos_embed": host.vit.embeddings.position_embeddings,
        "patch_embed.proj.weight": host.vit.embeddings.patch_embeddings.projection.weight,
        "patch_embed.proj.bias": host.vit.embeddings.patch_embeddings.projection.bias,
    }
    for kind in ("weight", "bias"):
        for i, layer in enumerate(host.vit.layers):
            parts = [getattr(getattr(layer.attention, f"{part}_proj"), kind) for part in "qkv"]
            its = {"attn.qkv": torch.cat(parts), "attn.proj": getattr(layer.attention.o_proj, kind)}
            its |= {"norm1": getattr(layer.layernorm_before, kind), "norm2": getattr(layer.layernorm_after, kind)}
            its |= {"mlp.fc1": getattr(layer.mlp.fc1, kind), "mlp.fc2": getattr(layer.mlp.fc2, kind)}
            state |= {f"blocks.{i}.{key}.{kind}": value for key, value in its.items()}
        state |= {f"norm.{kind}": getattr(host.vit.layernorm, kind), f"head.{kind}": getattr(host.classifier, kind)}
    vit.load_state_dict(state)
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = host.config.layer_norm_eps
    return vit


@pytest.mark.parametrize("thresholds", [(4.6,), (4.6, 4.0)])
def test_merged_it_is_what_timm_s_model_with_these_weights_is(thresholds: tuple, pictures: Tensor) -> None:
    host = make("ViT, classes")
    actual, expected = aptvit.adapt(host, thresholds=thresholds), aptvit.adapt(as_timm(host), thresholds=thresholds)
    new = {name: torch.randn_like(p) * 0.1 for name, p in actual.coarse_embed.named_parameters()}
    for model in (actual, expected):
        model.coarse_embed.load_state_dict(new)
    with torch.no_grad():
        assert actual.layout(pictures).seqlens == expected.layout(pictures).seqlens
        assert actual.layout(pictures).keep_ratio < 1
        assert_same(actual(pictures).logits, expected(pictures))
        maps = [m.forward_intermediates(pictures, indices=[1, -1], intermediates_only=True) for m in (actual, expected)]
        assert_same(maps[0], maps[1])
        pooled = [m.forward_head(m.forward_features(pictures), pre_logits=True) for m in (actual, expected)]
        assert_same(pooled[0], pooled[1])


def test_rotary_angles_of_coarse_patches_are_those_of_their_centres() -> None:
    host = make("DINOv3")
    adapter = aptvit.adapt(host).adapter
    from aptvit.layers.rotary import centre_rotation

    coarse = centre_rotation(adapter.rotation_table((8, 8)), (8, 8), 2)
    centres = torch.arange(1, 8, 2) / 8 * 2 - 1
    where = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).flatten(0, 1)
    angles = 2 * torch.pi * where[:, :, None] * host.rope_embeddings.inv_freq
    angles = angles.flatten(1, 2).tile(2)
    torch.testing.assert_close(coarse, torch.cat([angles.sin(), angles.cos()], -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "CLIP", "SigLIP"])
def test_absolute_positions_of_coarse_patches_are_resampled_as_timm_does(name: str) -> None:
    adapter = aptvit.adapt(make(name)).adapter
    own = adapter.core.embeddings
    table = own.position_embeddings if hasattr(own, "position_embeddings") else own.position_embedding.weight[None]
    expected = timm.layers.resample_abs_pos_embed(table[:, -64:], [4, 4], [8, 8], num_prefix_tokens=0)[0]
    assert_same(adapter.position_table((8, 8), 2), expected)
    assert_same(coarse_positions(table[:, -64:], (8, 8), (8, 8), 2), expected)


def test_restore_grid_gives_the_host_s_shape(pictures: Tensor) -> None:
    model = aptvit.adapt(make("DINOv2, registers"), thresholds=(4.6,))
    with torch.no_grad():
        ragged = model(pictures, output_hidden_states=True)
        full = model(pictures, restore_grid=True, output_hidden_states=True)
        other = model([*pictures, torch.randn(3, 16, 32)], restore_grid=True)
    assert full.last_hidden_state.shape == (3, 5 + 64, 32)
    assert [tuple(rows.shape) for rows in other.last_hidden_state] == [(69, 32)] * 3 + [(5 + 8, 32)]
    assert all(state.shape == (3, 69, 32) for state in full.hidden_states)
    for image, rows in enumerate(ragged.last_hidden_state):
        grid = full.last_hidden_state[image, 5:].unflatten(0, (8, 8))
        assert_same(full.last_hidden_state[image, :5], rows[:5])
        for row, (top, left, side) in zip(rows[5:], ragged.layout.patches(image).tolist(), strict=True):
            cells = grid[top // 8 : (top + side) // 8, left // 8 : (left + side) // 8].flatten(0, 1)
            assert (cells == row).all()


def test_keep_makes_plain_tensors(pictures: Tensor) -> None:
    model = aptvit.adapt(make("SigLIP"), keep=0.5)
    out = model(pixel_values=pictures)
    assert out.last_hidden_state.shape == (3, 31, 32)  # 11 merges of 64 tokens save three each
    assert out.layout.seqlens == [31] * 3


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_zero_shot(kind: str, pictures: Tensor) -> None:
    config = getattr(transformers, f"{kind}Config")(**BOTH)
    host = perturbed(getattr(transformers, f"{kind}Model")(config).eval())
    model = aptvit.adapt(host)
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0], [3, 4, 5, 2]])
    with torch.no_grad():
        for name, value in (("image", pictures), ("text", ids)):
            expected = getattr(host, f"get_{name}_features")(value)
            actual = getattr(model, f"get_{name}_features")(value)
            assert_same(actual.pooler_output, expected.pooler_output)
        expected, actual = (either(input_ids=ids, pixel_values=pictures, return_loss=True) for either in (host, model))
        for key in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds", "loss"):
            assert_same(actual[key], expected[key])
        model.thresholds = 4.6
        joint = model.get_image_features(pictures).pooler_output
        apart = [model.get_image_features(image[None]).pooler_output for image in pictures]
        assert_same(joint, torch.cat(apart))
        assert model(input_ids=ids, pixel_values=pictures).logits_per_image.shape == (3, 3)


@pytest.fixture
def naflex() -> Callable[..., Any]:
    def make(kind: str = "Siglip2VisionModel") -> Any:
        config = {
            "Siglip2VisionModel": lambda: transformers.Siglip2VisionConfig(**NAFLEX),
            "Siglip2Model": lambda: transformers.Siglip2Config(vision_config=NAFLEX, text_config=TEXT),
            "Siglip2ForImageClassification": lambda: transformers.Siglip2Config(
                vision_config=NAFLEX, text_config=TEXT, num_labels=5
            ),
        }[kind]()
        return perturbed(getattr(transformers, kind)(config).eval())

    return make


@pytest.fixture
def flexible_inputs() -> dict[str, Tensor]:
    """What SigLIP 2's processor makes of three images of different shapes."""
    shapes = torch.tensor([[6, 10], [8, 8], [4, 5]])
    rows = torch.randn(3, 64, 8 * 8 * 3)
    rows[0, 20:40] = 0.1
    valid = torch.arange(64) < shapes.prod(1)[:, None]
    return {"pixel_values": rows * valid[..., None], "pixel_attention_mask": valid.int(), "spatial_shapes": shapes}


def test_siglip_2_reads_rows_of_patches_of_any_shape(naflex: Any, flexible_inputs: dict[str, Tensor]) -> None:
    host = naflex()
    model = aptvit.adapt(host)
    with torch.no_grad():
        expected, actual = host(**flexible_inputs), model(**flexible_inputs)
        assert_same(actual.pooler_output, expected.pooler_output)
        for its, rows, valid in zip(
            actual.last_hidden_state, expected.last_hidden_state, flexible_inputs["pixel_attention_mask"], strict=True
        ):
            assert_same(its, rows[valid.bool()])
        model.thresholds = 4.6
        merged = model(**flexible_inputs)
        assert merged.layout.keep_ratio < 1
        one = {key: value[:1] for key, value in flexible_inputs.items()}
        assert_same(model(**one).pooler_output, merged.pooler_output[:1])


def test_siglip_2_around_its_tower(naflex: Any, flexible_inputs: dict[str, Tensor]) -> None:
    host = naflex("Siglip2Model")
    model = aptvit.adapt(host)
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        expected = host.get_image_features(**flexible_inputs).pooler_output
        assert_same(model.get_image_features(**flexible_inputs).pooler_output, expected)
        both = [either(input_ids=ids, **flexible_inputs).logits_per_image for either in (model, host)]
        assert_same(*both)
        host = naflex("Siglip2ForImageClassification")
        assert_same(aptvit.adapt(host)(**flexible_inputs).logits, host(**flexible_inputs).logits)


def test_the_host_stays_as_it_is(pictures: Tensor) -> None:
    host = make("CLIP, projected")
    state = copy.deepcopy(host.state_dict())
    implementation = host.config._attn_implementation
    model = aptvit.adapt(host, thresholds=(1e9,))
    model(pictures)
    assert host.config._attn_implementation == implementation
    assert host.state_dict().keys() == state.keys()
    with torch.no_grad():
        assert host(pixel_values=pictures).last_hidden_state.shape == (3, 65, 32)
    mine = dict(model.named_parameters())
    assert all(mine[name] is parameter for name, parameter in host.named_parameters())
    assert {name for name in mine if name not in state} == {
        *(
            "coarse_embed.conv.weight",
            "coarse_embed.conv.bias",
            "coarse_embed.linear.weight",
            "coarse_embed.linear.bias",
        )
    }


def test_eager_hosts_run_packed_all_the_same(pictures: Tensor) -> None:
    host = make("DINOv2", attn_implementation="eager")
    model = aptvit.adapt(host, thresholds=(4.6,))
    with torch.no_grad():
        apart = torch.cat([model(image[None]).pooler_output for image in pictures])
        assert_same(model(pictures).pooler_output, apart)
    model.adapter.core.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="would see each other"):
        model(pictures)


def test_checkpointed_blocks_have_the_same_gradients(pictures: Tensor) -> None:
    host = make("ViT, classes").train()
    model = aptvit.adapt(host, thresholds=(4.6,))
    gradients = []
    for checkpointing in (False, True):
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        model.zero_grad()
        model(pictures).logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert_same(gradients[1], gradients[0])
    host.gradient_checkpointing_enable()
    again = aptvit.adapt(host, thresholds=(4.6,))
    again.coarse_embed.load_state_dict(model.coarse_embed.state_dict())
    again.zero_grad()
    again(pictures).logits.square().sum().backward()
    assert_same(torch.cat([p.grad.flatten() for p in again.parameters() if p.grad is not None]), gradients[0])


def test_stochastic_depth_drops_whole_images() -> None:
    model = aptvit.adapt(make("DINOv2", drop_path_rate=0.5), thresholds=(1e9,)).train()
    x = torch.randn(1, 3, 64, 64).expand(16, -1, -1, -1)
    with torch.no_grad():
        rows = model(x, restore_grid=True).last_hidden_state
    assert len({tuple(row.flatten()[:3].tolist()) for row in rows}) > 4  # equal images took different ways


def test_saved_and_loaded(tmp_path: Path, pictures: Tensor) -> None:
    model = aptvit.adapt(make("DINOv2, registers, classes"), thresholds=(4.6, 4.0), mean=[0.4] * 3, std=[0.3] * 3)
    torch.nn.init.normal_(model.coarse_embed.linear.weight, std=0.1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["library"] == "transformers"
    again = aptvit.from_pretrained(tmp_path)
    assert type(again) is type(model)
    with torch.no_grad():
        assert_same(again(pictures).logits, model(pictures).logits, 0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert_same(other(pictures).logits, model(pictures).logits, 0)
            other.classifier.weight.zero_()
        assert model.classifier.weight.abs().max() > 0


def test_images_are_unnormalised_as_the_processor_normalised_them(tmp_path: Path) -> None:
    assert aptvit.adapt(make("CLIP")).patchifier.mean == pytest.approx(transformers.image_utils.OPENAI_CLIP_MEAN)
    assert aptvit.adapt(make("SigLIP")).patchifier.std == pytest.approx([0.5] * 3)
    processor = transformers.BitImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    model = aptvit.adapt(make("DINOv2"), processor=processor)
    assert model.patchifier.mean == pytest.approx([0.1, 0.2, 0.3])
    assert model.patchifier.std == pytest.approx([0.4, 0.5, 0.6])
    make("DINOv2").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert aptvit.adapt(loaded).patchifier.mean == pytest.approx([0.1, 0.2, 0.3])
    assert aptvit.adapt(loaded, mean=[0.7] * 3).patchifier.mean == pytest.approx([0.7] * 3)


def test_a_processor_s_output_is_what_it_reads(photos: list[Tensor]) -> None:
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    model = aptvit.adapt(make("CLIP"), keep=0.6, processor=processor)
    out = model(**processor(photos, return_tensors="pt"))
    assert out.pooler_output.shape == (5, 32)
    raw = torch.stack([photo[:, :64, :64] for photo in photos])
    normalised = (raw / 255 - torch.tensor(processor.image_mean)[:, None, None]) / torch.tensor(processor.image_std)[
        :, None, None
    ]
    with torch.no_grad():
        assert_same(model(raw).pooler_output, model(normalised).pooler_output, 1e-4)


@pytest.mark.parametrize("name, key", [("DINOv2", "pooler_output"), ("ViT, classes", "logits")])
def test_packs_of_many_images(name: str, key: str, pictures: Tensor) -> None:
    model = aptvit.adapt(make(name), thresholds=(4.6,))
    mixed = [*pictures, torch.randn(3, 32, 96)]
    rows = predict(model, mixed, max_tokens=100)
    with torch.no_grad():
        assert_same(rows, torch.cat([model(image[None])[key] for image in mixed]))


def test_labels_make_a_loss(pictures: Tensor) -> None:
    host = make("ViT, classes")
    model = aptvit.adapt(host)
    labels = torch.tensor([1, 2, 3])
    with torch.no_grad():
        assert_same(model(pixel_values=pictures, labels=labels).loss, host(pixel_values=pictures, labels=labels).loss)
        assert isinstance(model(pictures, return_dict=False), tuple)
        assert_same(model(pictures, return_dict=False)[0], host(pictures).logits)


def test_trainers_of_transformers_take_it(tmp_path: Path, pictures: Tensor) -> None:
    model = aptvit.adapt(make("ViT, classes"), thresholds=(4.6,))
    rows = [{"pixel_values": picture, "labels": number} for number, picture in enumerate(pictures)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = model.coarse_embed.linear.weight.clone()
    assert trainer.train().training_loss > 0
    assert not torch.equal(model.coarse_embed.linear.weight, before)
    assert trainer.evaluate()["eval_loss"] > 0


def test_timm_s_protocol(pictures: Tensor) -> None:
    model = aptvit.adapt(make("ViT, classes"), keep=0.5)
    assert (model.num_classes, model.embed_dim, model.num_prefix_tokens) == (7, 32, 1)
    model.reset_classifier(3)
    assert model(pictures).logits.shape == (3, 3)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(set(scales.values())) == 5  # embedding, three blocks, head
    assert scales["coarse_embed.linear.weight"] == scales["vit.embeddings.cls_token"] == 0.5**4
    assert scales["classifier.weight"] == 1
    assert "vit.embeddings.position_embeddings" in model.no_weight_decay()
    assert aptvit.calibrate(model, pictures, keep=0.7) is not None
    assert model.layout(pictures).keep_ratio == pytest.approx(0.7, abs=0.15)


def test_what_cannot_be_adapted_is_named() -> None:
    with pytest.raises(ValueError, match=r"no ViT inside whose parts can be told.*docs/hosts\.md"):
        aptvit.adapt(transformers.BertModel(transformers.BertConfig(**TEXT)))
    swin = transformers.SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    with pytest.raises(ValueError, match="Swin merges patches between its stages"):
        aptvit.adapt(transformers.SwinModel(swin))
    with pytest.raises(ValueError, match="adapt the whole model"):
        aptvit.adapt(make("CLIP").encoder)


def test_bad_input_is_named(pictures: Tensor) -> None:
    model = aptvit.adapt(make("CLIP"), thresholds=(4.6,))
    with pytest.raises(ValueError, match="multiples of the patch size 8"):
        model(torch.randn(1, 3, 64, 70))
    with pytest.raises(ValueError, match="multiples of the patch size 8"):
        model(torch.randn(1, 3, 5, 5))
    with pytest.raises(ValueError, match="attention maps"):
        model(pictures, output_attentions=True)
    with pytest.raises(ValueError, match="no pixel_values"):
        model(input_ids=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="has no image_mean and image_std"):
        aptvit.adapt(make("CLIP"), processor=object())
    with pytest.raises(ValueError, match="has no classifier"):
        model.reset_classifier(3)
