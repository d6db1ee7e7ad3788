"""The rates that each parameter has in each update, against formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch

import aptvit
from aptvit.training import ClassificationRecipe
from aptvit.training.methods import set_drop_path
from aptvit.training.optimization import choose_trained, make_optimizer, make_schedule, parameter_groups


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return aptvit.adapt(timm.create_model("test_vit", num_classes=5), keep=0.5)


def rates(model: Any, recipe: ClassificationRecipe, num_updates: int) -> list[dict[str, float]]:
    """The learning rate of each parameter in each update."""
    optimizer = make_optimizer(parameter_groups(model, model, recipe), recipe)
    schedule = make_schedule(optimizer, recipe, num_updates)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result = []
    for update in range(num_updates):
        schedule.step_update(update)
        result.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
    return result


def test_layer_decay_is_applied_in_every_update(model: Any) -> None:
    recipe = ClassificationRecipe(lr=1.0, layer_decay=0.5, new_lr=3.0)
    depth = len(model.blocks)
    for learning_rates in rates(model, recipe, 10):
        top = learning_rates["head.weight"]
        assert learning_rates["norm.weight"] == pytest.approx(top * 0.5)  # timm groups it with the last block
        for i in range(depth):
            assert learning_rates[f"blocks.{i}.attn.qkv.weight"] == pytest.approx(top * 0.5 ** (depth - i))
        assert (
            learning_rates["patch_embed.proj.weight"]
            == learning_rates["pos_embed"]
            == pytest.approx(top * 0.5 ** (depth + 1))
        )
        assert learning_rates["coarse_embed.linear.weight"] == pytest.approx(3 * top)
        assert set(learning_rates) == {name for name, _ in model.named_parameters()}


def test_the_schedule_counts_updates(model: Any) -> None:
    recipe = ClassificationRecipe(lr=2.0, batch_size=512, lr_batch=256, warmup=0.2, min_lr=0.1)
    result = [learning_rates["head.weight"] for learning_rates in rates(model, recipe, 50)]
    peak, warm = 4.0, 10
    expected = [peak / 11 + (peak - peak / 11) * i / warm for i in range(warm)]
    expected += [0.4 + 0.5 * (peak - 0.4) * (1 + math.cos(math.pi * i / 40)) for i in range(40)]
    assert result == pytest.approx(expected)


def test_biases_norms_and_positions_have_no_weight_decay(model: Any) -> None:
    for decay in (0.75, 1.0):
        groups = parameter_groups(model, model, ClassificationRecipe(weight_decay=0.05, layer_decay=decay))
        decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
        for name, parameter in model.named_parameters():
            plain = parameter.ndim <= 1 or name in ("pos_embed", "cls_token", "reg_token")
            assert (id(parameter) in decayed) != plain, name


def test_only_new_parameters_are_trained(model: Any) -> None:
    choose_trained(model, model, ClassificationRecipe(trains="new"), new_head=False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("coarse_embed.")
    }
    choose_trained(model, model, ClassificationRecipe(trains="new"), new_head=True)
    assert model.head.weight.requires_grad and not model.blocks[0].attn.qkv.weight.requires_grad
    with pytest.raises(ValueError, match="adds no parameters"):
        vit = timm.create_model("test_vit")
        choose_trained(vit, vit, ClassificationRecipe(trains="new"), new_head=False)


def test_drop_path_grows_with_depth_and_is_drawn_for_each_image() -> None:
    vit = timm.create_model("test_vit", num_classes=5)
    set_drop_path(vit, 0.9)
    reference = timm.create_model("test_vit", num_classes=5, drop_path_rate=0.9)
    result, expected = ([getattr(b.drop_path1, "drop_prob", 0.0) for b in v.blocks] for v in (vit, reference))
    assert result == pytest.approx(expected)
    torch.manual_seed(0)
    model = aptvit.adapt(vit, keep=1.0).train()
    image = torch.rand(1, 3, 160, 160).expand(8, -1, -1, -1)
    with torch.no_grad():
        logits = model(image)
    # The images are equal: outputs differ because blocks are dropped for some images only.
    assert len(logits.round(decimals=4).unique(dim=0)) > 1


def test_an_unknown_optimizer_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="timm has no optimizer 'sdg'"):
        make_optimizer(parameter_groups(model, model, ClassificationRecipe()), ClassificationRecipe(optimizer="sdg"))
