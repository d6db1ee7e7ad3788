"""Models around a ViT beside transformers' own, and beside the host on full grids whose hidden cells nobody reads."""

from __future__ import annotations

import copy
import inspect
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import aptvit
from aptvit.encoder.full_grid import GridTokens
from aptvit.models.around_check import largest_difference, run_on_full_grids
from aptvit.patching.layout import PatchLayout

from .around_hosts import HOSTS, Example, make

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def random_layout(model: Any, images: Tensor, seed: int = 0, share: float = 0.5) -> PatchLayout:
    """Patches of all sizes by chance, other ones in each image unless positions are rotary."""
    inner, scales = model.aptvit.inner, model.aptvit.num_scales
    whole = model.aptvit.layout(images, keep=1.0)
    count, (rows, cols) = whole.num_images, whole.grid_sizes[0]
    generator = torch.Generator().manual_seed(seed)
    # Positions that are the same for all images, on full grids.
    same = inner.rotates_in_attention or "position_embeddings" in inspect.signature(inner.layers[0].forward).parameters
    maps = []
    for image in range(count):
        if image and same:
            maps.append(maps[0])
            continue
        scale_map = torch.zeros(rows, cols, dtype=torch.int8)
        for scale in range(1, scales):
            side = 1 << scale
            chosen = torch.rand(rows // side, cols // side, generator=generator) < share / scale
            for row, col in chosen.nonzero().tolist():
                scale_map[row * side : (row + 1) * side, col * side : (col + 1) * side] = scale
        maps.append(scale_map)
    return PatchLayout.from_scale_map(torch.stack(maps), inner.patch_size, scales)


@pytest.fixture(scope="module", params=HOSTS)
def example(request: pytest.FixtureRequest) -> Example:
    return make(request.param)


def adapt(example: Example, **options: Any) -> Any:
    return aptvit.adapt(example.host, **{"scales": 2, "check": False, "init": "nonzero", **options})


def as_rows(model: Any, tokens: Tensor) -> Tensor:
    """(R, N, D) tokens of layers, also of those that give maps."""
    plain = tokens + 0
    return plain if model.aptvit.inner.map_attention is None else model.aptvit.inner.rows_of_map(plain)


def test_nothing_merged_is_the_host(example: Example) -> None:
    model = adapt(example)
    assert isinstance(model, type(example.host)) and model.config.to_dict() == example.host.config.to_dict()
    for number in range(len(example.sizes)):
        images = example.images(number)
        with torch.no_grad():
            expected = example(example.host, images)
            assert largest_difference(example(model, images, keep=1.0), expected) <= 1e-5
            whole = model.aptvit.layout(images, keep=1.0)
            with model.aptvit.calling(whole, packs_always=True):
                packed = example(model, images)
        assert largest_difference(packed, expected) <= 1e-5


def test_merged_patches_are_the_host_on_full_grids_with_hidden_cells(example: Example) -> None:
    model = adapt(example)
    images = example.images()
    layout = random_layout(model, images)
    assert 0.3 < layout.keep_ratio < 0.9
    core = model.aptvit.inner.core
    layers: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: layers.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.aptvit.inner.layers
    ]
    with torch.no_grad():
        with model.aptvit.calling(layout):
            core(images)
        for hook in hooks:
            hook.remove()
        expected = run_on_full_grids(model, example.host, images, layout)
    assert len(layers) == len(expected.layers)
    assert any(isinstance(layer, GridTokens) for layer in layers)
    assert expected.kept is not None and not expected.kept.all()
    for layer, reference in zip(layers, expected.layers, strict=True):
        layer = as_rows(model, layer)
        kept = torch.nn.functional.pad(expected.kept, (reference.shape[1] - expected.kept.shape[1], 0), value=True)
        assert largest_difference(layer[kept], reference[kept]) <= 1e-5


def test_merged_patches_in_bfloat16(example: Example) -> None:
    host = copy.deepcopy(example.host).bfloat16()
    model = aptvit.adapt(host, scales=2, check=False)
    images = example.images().bfloat16()
    layout = random_layout(model, images)
    with torch.no_grad(), model.aptvit.calling(layout):
        packed: list[Tensor] = []
        hook = model.aptvit.inner.layers[-1].register_forward_hook(
            lambda _m, _i, out: packed.append(out[0] if isinstance(out, tuple) else out)
        )
        model.aptvit.inner.core(images)
        hook.remove()
        expected = run_on_full_grids(model, host, images, layout).layers[-1]
    assert packed[0].dtype == torch.bfloat16
    assert largest_difference(as_rows(model, packed[0]).float(), expected.float()) <= 0.05


def test_images_of_a_batch_do_not_see_each_other(example: Example) -> None:
    model, images = adapt(example), example.images()
    layout = random_layout(model, images)
    others = torch.cat([images[:1], example.images(seed=1)[1:]])
    with torch.no_grad():
        first, second = (example(model, batch, layout=layout) for batch in (images, others))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_gradients_are_those_of_the_host(example: Example) -> None:
    model, images = adapt(example, resize_only=True), example.images()
    gradients = []
    for network, options in ((example.host, {}), (model, {"keep": 1.0})):
        example.host.zero_grad()
        example(network, images, **options).float().square().mean().backward()
        gradients.append({name: p.grad for name, p in example.host.named_parameters() if p.grad is not None})
    host, adaptive = gradients
    assert host.keys() == adaptive.keys() and host
    for name, gradient in host.items():
        assert largest_difference(adaptive[name], gradient) <= 1e-4, name


def test_each_parameter_of_the_vit_gets_a_gradient_when_patches_merge(example: Example) -> None:
    model, images = adapt(example), example.images()
    model.train()
    example.host.zero_grad()
    layout = random_layout(model, images)
    with model.aptvit.calling(layout):
        leaves = tree_leaves(model.aptvit.inner.core(images))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    sum(tensor.square().mean() for tensor in tensors).backward()
    for name, parameter in model.aptvit.inner.embeddings.named_parameters():
        if "mask_token" not in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for name, parameter in model.coarse_embed.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_saved_models_are_plain_hosts_with_settings_beside(example: Example, tmp_path: Path) -> None:
    model, images = adapt(example, thresholds=(4.5,)), example.images()
    if not hasattr(transformers, type(example.host).__name__):
        with pytest.raises(ValueError, match="transformers does not export"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "aptvit.json").read_text())
    assert settings["architecture"] == type(example.host).__name__ and settings["options"]["thresholds"] == [4.5]
    plain = type(example.host).from_pretrained(tmp_path).eval()
    loaded = aptvit.from_pretrained(tmp_path)
    with torch.no_grad():
        assert largest_difference(example(plain, images), example(example.host, images)) <= 1e-5
        assert largest_difference(example(loaded, images), example(model, images)) <= 1e-5
    assert loaded.aptvit.thresholds == (4.5,) and not loaded.training


def test_copies_are_models_of_their_own() -> None:
    example = make("depth_anything")
    model, images = adapt(example, keep=0.5), example.images()
    other = copy.deepcopy(model)
    assert other.aptvit is not model.aptvit and other.aptvit.inner.vit is other
    other.aptvit.keep = 1.0
    with torch.no_grad():
        assert largest_difference(example(other, images), example(example.host, images)) <= 1e-5
        assert largest_difference(example(model, images), example(example.host, images)) > 1e-3
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", ["depth_anything", "dpt", "video_mae", "vjepa2", "beit", "trocr", "vitdet", "sam"])
def test_checkpointing_of_transformers_gives_the_same_gradients(name: str) -> None:
    example = make(name)
    model, images = adapt(example), example.images()
    layout = random_layout(model, images)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.aptvit.inner.layers.train()  # dropout is 0 and stochastic depth off in these layers
        model.zero_grad()
        torch.manual_seed(0)
        example(model, images, layout=layout).float().square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        assert largest_difference(gradients[1][parameter], gradient) <= 1e-4, parameter


def test_images_skip_branches_of_map_layers_by_themselves() -> None:
    """Stochastic depth of VitDet: a factor for each image, 0 or 1 / (1 - p), the same for all of its tokens."""
    config = make("vitdet").host.config
    config.drop_path_rate = 0.5
    model = aptvit.adapt(transformers.VitDetBackbone(config), scales=2, check=False).train()
    images = torch.randn(4, 3, 128, 128)
    layout = random_layout(model, images)
    drop = model.aptvit.inner.layers[-1].drop_path
    seen = set()
    with torch.no_grad(), model.aptvit.calling(layout):
        model(images)
        plan = model.aptvit.call.plan
        for _ in range(20):
            factors = drop(torch.ones(1, 1, len(plan.index), 3))[0, 0]
            for number in range(4):
                of_image = factors[plan.index // plan.shape[1] == number].unique().tolist()
                assert of_image in ([0.0], [2.0])
                seen.add((number, *of_image))
        assert len(seen) == 8  # each image with and without the branch
        drop.eval()
        assert torch.equal(drop(torch.ones(1, 1, 5, 3)), torch.ones(1, 1, 5, 3))


def test_threads_with_budgets_of_their_own() -> None:
    example = make("depth_anything")
    model = adapt(example)
    images = [example.images(seed=seed) for seed in range(4)]
    keeps = [1.0, 0.75, 0.5, 0.6]
    with torch.no_grad():
        expected = [example(model, batch, keep=keep) for batch, keep in zip(images, keeps, strict=True)]
    answers: list[list[Tensor]] = [[] for _ in keeps]

    def ask(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                answers[number].append(example(model, images[number], keep=keeps[number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, own in enumerate(answers):
        assert len(own) == 5 and all(largest_difference(answer, expected[number]) <= 1e-5 for answer in own)


def test_compiled_layers_and_a_compiled_model_answer_alike() -> None:
    example = make("depth_anything")
    model, images = adapt(example, keep=0.5), example.images()
    with torch.no_grad():
        expected = example(model, images)
        assert largest_difference(example(torch.compile(model, backend="eager"), images), expected) <= 1e-5
        model.aptvit.compile(backend="eager")
        assert largest_difference(example(model, images), expected) <= 1e-5
        other = example.images(1)
        assert largest_difference(example(model, other, keep=1.0), example(example.host, other)) <= 1e-5


def test_trainer_makes_a_step(tmp_path: Path) -> None:
    example = make("upernet")
    model = adapt(example, keep=0.5)
    rows = [
        {"pixel_values": example.images()[0], "labels": torch.randint(0, 3, (112, 112)), "unused": 1} for _ in range(4)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert result.global_step == 2
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(name.startswith("coarse_embed") for name in changed) and any("backbone" in name for name in changed)


def test_pipelines_of_transformers_take_the_model() -> None:
    from PIL import Image

    example = make("depth_anything")
    model = adapt(example, keep=0.5)
    processor = transformers.DPTImageProcessor(size={"height": 112, "width": 112})
    estimate = transformers.pipeline("depth-estimation", model=model, image_processor=processor, device="cpu")
    image = Image.effect_mandelbrot((160, 120), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    result = estimate(image)
    assert result["depth"].size == (160, 120)


def test_outputs_are_plain_tensors() -> None:
    example = make("depth_anything")
    model, images = adapt(example, keep=0.5), example.images()
    with torch.no_grad():
        outputs = model(images, output_hidden_states=True)
    assert len(outputs.hidden_states) == 5
    assert all(type(state) is Tensor for state in (*outputs.hidden_states, outputs.predicted_depth))
    rows, tokens = outputs.hidden_states[-1].shape[:2]
    assert (rows, tokens) == (2, 8 * 12 + 1)


def test_text_is_generated_from_merged_images() -> None:
    example = make("trocr")
    model, images = adapt(example), example.images()
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = example.host.generate(images, **options)
    model.aptvit.keep = 1.0
    assert torch.equal(model.generate(images, **options), expected)
    model.aptvit.keep = 0.5
    assert model.generate(images, **options).shape == expected.shape


def test_calibration_takes_models_around_a_vit() -> None:
    example = make("depth_anything")
    model = adapt(example, thresholds=(5.0,))
    images = example.images()
    aptvit.calibrate(model, keep=0.6, images=[images])
    assert abs(model.aptvit.layout(images).keep_ratio - 0.6) < 0.1


def test_budgets_of_a_call() -> None:
    example = make("depth_anything")
    model, images = adapt(example, keep=0.5), example.images()
    with torch.no_grad():
        layout = model.aptvit.layout(images, keep=0.75)
        assert torch.equal(example(model, images, keep=0.75), example(model, images, layout=layout))
    with pytest.raises(ValueError, match="a layout fixes the number of tokens"):
        example(model, images, layout=layout, keep=0.5)


def test_batches_without_images_are_refused() -> None:
    model = adapt(make("depth_anything"), keep=0.5)
    with pytest.raises(ValueError, match="a batch without images"):
        model(torch.zeros(0, 3, 112, 112))


def test_adapters_of_peft_in_the_patch_projection_and_the_layers() -> None:
    peft = pytest.importorskip("peft")
    example = make("dpt_on_dinov2")
    model, images = adapt(example, init="zero"), example.images()
    names = r".*backbone.*(patch_embeddings\.projection|query|q_proj|value|v_proj)"
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, init_lora_weights=False))
    base = tuned.get_base_model()
    assert any(name.endswith("projection.lora_A.default.weight") for name, _ in tuned.named_parameters())
    layout = random_layout(base, images)
    merged = copy.deepcopy(tuned).merge_and_unload()
    with torch.no_grad():
        adaptive = example(tuned, images, layout=layout)
        assert largest_difference(adaptive, example(merged, images, layout=layout)) <= 1e-4
        with tuned.disable_adapter():
            assert largest_difference(example(tuned, images, layout=layout), adaptive) > 1e-3


# What is refused


def test_a_vision_language_model_is_refused() -> None:
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_tiny(), "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **_tiny(), "vocab_size": 32},
    )
    with pytest.raises(ValueError, match=r"aptvit\.vlm\.adapt"):
        aptvit.adapt(transformers.LlavaForConditionalGeneration(config))


def _tiny() -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_pyramids_are_refused() -> None:
    swin = transformers.SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    host = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=swin, hidden_size=8, num_labels=3, auxiliary_in_channels=16)
    )
    with pytest.raises(ValueError, match="Swin merges patches"):
        aptvit.adapt(host)


def test_yolos_is_refused_because_its_tokens_stand_behind_the_patches() -> None:
    config = transformers.YolosConfig(**_tiny(), image_size=[64, 64], patch_size=8, num_detection_tokens=5)
    with pytest.raises(ValueError, match="cannot adapt this model"):
        aptvit.adapt(transformers.YolosForObjectDetection(config).eval(), keep=0.5)


class _Norm(nn.Module):
    """A projection that is not affine."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:])


def test_an_embedding_that_is_not_affine_is_refused() -> None:
    example = make("depth_anything")
    embeddings = example.host.backbone.embeddings
    embeddings.dropout = _Norm()
    with pytest.raises(ValueError, match="the embedding of coarse patches"):
        aptvit.adapt(example.host, keep=0.5)
    assert aptvit.adapt(example.host, keep=0.5, check=False) is not None


def test_another_order_of_tokens_is_refused() -> None:
    example = make("dpt_on_dinov2")
    embeddings = example.host.backbone.embeddings

    class Reversed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[:, 1:], x[:, :1]], dim=1)

    embeddings.dropout = Reversed()
    with pytest.raises(ValueError, match="cannot adapt this model"):
        aptvit.adapt(example.host, keep=0.5)


def test_images_that_are_not_square_are_refused_where_the_host_mixes_up_their_sides() -> None:
    example = make("rf_detr")
    model = adapt(example)
    with pytest.raises(ValueError, match="resize them to squares"):
        model(torch.randn(1, 3, 128, 192))


def test_windows_that_do_not_hold_whole_patches_are_refused() -> None:
    example = make("rf_detr")
    model = adapt(example, scales=3, thresholds=(4.0, 3.0))
    with pytest.raises(ValueError, match="scales=2"):
        model(torch.randn(1, 3, 192, 192))


def test_masks_of_patches_are_refused_where_patches_merge() -> None:
    example = make("video_mae")
    model, clips = adapt(example, keep=0.5), example.images()
    with pytest.raises(ValueError, match="masks of patches"):
        model.videomae(clips, bool_masked_pos=torch.zeros(2, 128, dtype=torch.bool))


@pytest.mark.parametrize("name", ["pad", "window_size", "token_bucket"])
def test_options_of_bare_towers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is for bare towers"):
        adapt(make("depth_anything"), **{name: 4})


def test_scores_leave_incomplete_patches_out_as_layouts_do() -> None:
    model = adapt(make("depth_anything"), thresholds=(5.0,))
    images = torch.randn(2, 3, 120, 170)  # 8 x 12 whole patches of 14
    ((group, scores),) = model.aptvit.scores(images)
    assert scores[2].shape == (2, 4, 6) and group.images.shape[2:] == (112, 168)
    assert model.aptvit.layout(images).grid_sizes == [(8, 12)] * 2


def test_a_folder_that_names_another_model_is_refused(tmp_path: Path) -> None:
    adapt(make("depth_anything"), keep=0.5).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_pretrained_backbone": True}))
    with pytest.raises(ValueError, match="built around another model"):
        aptvit.from_pretrained(tmp_path)


def test_scorers_of_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="scorer='glance'"):
        adapt(make("depth_anything"), scorer="glance")


@pytest.mark.parametrize("init", ["zero", "residual", "nonzero"])
def test_the_check_is_of_the_host_not_of_the_branch_that_is_new(init: str) -> None:
    model = aptvit.adapt(make("depth_anything").host, keep=0.5, init=init)
    assert "coarse_embed.linear.weight" in model.state_dict()


def test_the_check_restores_modes_and_leaves_the_host_as_it_was() -> None:
    example = make("depth_anything")
    example.host.train()
    example.host.backbone.layernorm.eval()
    state = io.BytesIO()
    torch.save(example.host.state_dict(), state)
    model = aptvit.adapt(example.host, keep=0.5)
    assert example.host.training and model.training and not model.backbone.layernorm.training
    for name, value in torch.load(io.BytesIO(state.getvalue())).items():
        assert torch.equal(example.host.state_dict()[name], value)
