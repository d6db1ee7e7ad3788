from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aptvit.merging import dtem, fit_dtem, parse_r, token_schedule, tome
from aptvit.merging.matching import bipartite_matching, merge
from aptvit.merging.soft import relaxed_pairs, soft_merge

Host = Callable[..., Any]
Pixels = Callable[[int], Tensor]

HOSTS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_little_patch16_reg4_gap_256": {"embed_dim": 96, "num_heads": 2},
}


def make_dtem(host: Any, r: Any, **options: Any) -> Any:
    """With biases that matter."""
    model = dtem(host, r, **options)
    for linear in model.reduction.metric:
        torch.nn.init.normal_(linear.weight, std=0.1)
        torch.nn.init.normal_(linear.bias, std=0.3)
    return model


def metric_of(model: Any, layer: int, normed: np.ndarray) -> np.ndarray:
    linear = model.reduction.metric[layer]
    return normed @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()


# Evaluation: hard merging


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("name", HOSTS)
def test_evaluation_is_as_defined(make_host: Host, oracle: Any, pixels: Pixels, name: str, prop_attn: bool) -> None:
    host = make_host(name, depth=3, img_size=80, **HOSTS[name]).double()
    model = make_dtem(host, 6, feat_dim=5, prop_attn=prop_attn)
    vit = oracle.vit(host)

    def reduce(layer: int, x: Any, size: Any, normed: Any, attention: Any, k: Any) -> Any:
        return oracle.tome_step(x, size, metric_of(model, layer, normed), 6, vit.num_prefix)[:2]

    images = pixels(80)
    with torch.no_grad():
        got, by_keys = model(images), tome(host, 6, prop_attn=prop_attn)(images)
    expected = np.stack([vit.run(vit.embed(image), reduce, prop_attn) for image in images.numpy()])
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)
    assert not np.allclose(expected, by_keys, rtol=1e-3)
    assert model.tokens_per_block() == tome(host, 6).tokens_per_block()


def test_the_metric_starts_as_in_the_recipe(make_host: Host) -> None:
    metric = dtem(make_host(), 4).reduction.metric
    assert [m.out_features for m in metric] == [64, 64]
    for linear in metric:  # a normal distribution: 12288 numbers tell its deviation to 0.6 %
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert linear.weight.abs().max().item() > 0.06
        assert not linear.bias.any()
    wide = make_host(embed_dim=1024, num_heads=16, depth=1, img_size=32)
    assert dtem(wide, 1).reduction.metric[0].out_features == 128
    assert dtem(wide, 1, feat_dim=7).reduction.metric[0].out_features == 7
    assert dtem(wide.bfloat16(), 1).reduction.metric[0].weight.dtype == torch.bfloat16


# Training: soft merging


def soft_logits(oracle: Any, model: Any, host: Any, image: Any, r: list[int], frozen: dict | None = None) -> Any:
    """The forward of training. ``frozen`` keeps what has no gradient: the metric's inputs, the rows' divisors."""
    vit = oracle.vit(host)
    tokens = vit.embed(image)
    entering = token_schedule(len(tokens), vit.depth, r, vit.num_prefix)
    record: dict[Any, Any] = {}

    def reduce(layer: int, x: Any, size: Any, normed: Any, attention: Any, k: Any) -> Any:
        record["normed", layer] = normed if frozen is None else frozen["normed", layer]
        one_r = min(r[layer], (entering[layer] - vit.num_prefix) // 2)
        if one_r == 0:
            return x, size
        metric = metric_of(model, layer, record["normed", layer])
        divisors = None if frozen is None else frozen["divisors", layer]
        x, size, divisors = oracle.soft_step(x, size, metric, one_r, entering[layer], vit.num_prefix, divisors)
        record["divisors", layer] = divisors
        record["size", layer] = size
        return x, size

    return vit.run(tokens, reduce, True), record


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("r", [[6, 6, 6], [0, 4, 0], [100, 100, 100]])
@pytest.mark.parametrize("name", HOSTS)
def test_training_is_as_defined(
    make_host: Host, oracle: Any, pixels: Pixels, name: str, r: list[int], prop_attn: bool
) -> None:
    host = make_host(name, depth=3, img_size=80, **HOSTS[name]).double()
    model = make_dtem(host, r, feat_dim=5, prop_attn=prop_attn).train()
    images = pixels(80)
    expected = np.stack([soft_logits(oracle, model, host, image, r)[0] for image in images.numpy()])
    np.testing.assert_allclose(model(images).detach(), expected, rtol=1e-7, atol=1e-7)
    assert model.forward_features(images).tokens.shape[1] == 25 + host.num_prefix_tokens  # nothing leaves
    assert not np.allclose(expected, model.eval()(images).detach(), rtol=1e-3)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_gradients_are_those_of_the_definition(make_host: Host, oracle: Any, pixels: Pixels, layer: int) -> None:
    """Central differences of the numpy forward, for several weights of one block's metric."""
    # With a class token, what happens after the last attention does not matter: here it does.
    host = make_host("vit_little_patch16_reg4_gap_256", depth=3, img_size=80, embed_dim=96, num_heads=2).double()
    model = make_dtem(host, 5, feat_dim=5).train()
    image = pixels(80)[:1]
    model(image)[0, 3].backward()
    r = parse_r(3, 5)
    _, frozen = soft_logits(oracle, model, host, image[0].numpy(), r)
    weight = model.reduction.metric[layer].weight
    compared = 0
    for row, column in ((0, 0), (1, 20), (2, 40), (3, 60), (4, 90)):
        values = []
        for step in (-1e-5, 1e-5):
            with torch.no_grad():
                weight[row, column] += step
            values.append(soft_logits(oracle, model, host, image[0].numpy(), r, frozen)[0][3])
            with torch.no_grad():
                weight[row, column] -= step
        numeric = (values[1] - values[0]) / 2e-5
        assert weight.grad[row, column].item() == pytest.approx(numeric, rel=1e-4, abs=1e-8)
        compared += abs(numeric) > 1e-6
    assert compared >= 3


def test_clear_pairs_are_merged_as_hard_as_in_evaluation() -> None:
    """Eight pairs far apart from each other and of clearly different likeness: soft merging is ToMe, and behind its
    result are weightless tokens."""
    cosine = torch.tensor([0.1, 0.9, 0.0, 1.0, 0.2, 0.7, 0.3, 0.8], dtype=torch.float64)
    first, second = torch.eye(16, dtype=torch.float64).chunk(2)
    partner = cosine[:, None] * first + (1 - cosine**2).sqrt()[:, None] * second
    metric = torch.stack([first, partner], dim=1).flatten(0, 1)[None]  # token 2 i in A, its partner 2 i + 1 in B
    x = torch.randn(1, 16, 3, dtype=torch.float64)
    tokens, weight = soft_merge(x, None, metric, 4, 16, 0)
    expected, size = merge(x, None, bipartite_matching(metric, 4, 0))
    assert weight[0, :12].tolist() == pytest.approx(sorted(size[0].tolist(), reverse=True), abs=1e-2)
    assert weight[0, 12:].tolist() == pytest.approx([0] * 4, abs=1e-2)
    for rows in (slice(0, 4), slice(4, 12)):  # merged ones, untouched ones
        alike = expected[0, size[0] == (2 if rows.start == 0 else 1)]
        distance = torch.cdist(tokens[0, rows], alike)
        assert distance.min(1).values.max() < 0.05 and distance.min(0).values.max() < 0.05


@pytest.mark.parametrize("r", [0, 1, 5, 9])
def test_a_relaxed_choice_is_one_of_r_pairs(oracle: Any, r: int) -> None:
    scores = torch.randn(3, 9, 7, dtype=torch.float64).tanh().requires_grad_()
    pairs = relaxed_pairs(scores, r)
    for got, one in zip(pairs.detach().numpy(), scores.detach().numpy(), strict=True):
        np.testing.assert_allclose(got, oracle.soft_pairs(one, r)[0], atol=1e-9)
    assert (pairs >= 0).all() and (pairs.sum(2) <= 1 + 1e-9).all() and ((pairs > 0).sum(2) <= 3).all()
    assert (pairs.sum((1, 2)) <= r + 1e-9).all()


@pytest.mark.parametrize("r", [1, 5, 9])
def test_gradients_of_a_relaxed_choice_are_those_of_the_definition(oracle: Any, r: int) -> None:
    """Central differences of the numpy definition, the divisors of the rows kept."""
    scores = torch.randn(2, 9, 7, dtype=torch.float64).tanh().requires_grad_()
    direction = torch.randn(2, 9, 7, dtype=torch.float64)
    (grad,) = torch.autograd.grad((relaxed_pairs(scores, r) * direction).sum(), scores)
    for got, matrix, weights in zip(grad, scores.detach().numpy(), direction.numpy(), strict=True):
        _, divisors = oracle.soft_pairs(matrix, r)
        numeric = np.zeros_like(matrix)
        for place in np.ndindex(matrix.shape):
            for sign in (-1, 1):
                moved = matrix.copy()
                moved[place] += sign * 1e-6
                numeric[place] += sign * (oracle.soft_pairs(moved, r, divisors)[0] * weights).sum() / 2e-6
        assert np.abs(numeric).max() > 0.1
        np.testing.assert_allclose(got, numeric, rtol=1e-4, atol=1e-5)


def test_what_is_weighed_stays_the_same() -> None:
    x = torch.randn(2, 30, 4)
    size = torch.rand(2, 30) + 0.5
    tokens, weight = soft_merge(x, size, torch.randn(2, 30, 6), 7, 24, 2)
    torch.testing.assert_close(weight.sum(1), size.sum(1))
    torch.testing.assert_close((tokens * weight[..., None]).sum(1), (x * size[..., None]).sum(1))
    assert torch.equal(tokens[:, :2], x[:, :2])
    assert (weight[:, 2:].diff(dim=1) <= 0).all()


def test_half_precision_trains_as_full_precision_does(make_host: Host, images: Tensor) -> None:
    """What is compared and weighed stays float32: logits are alike, no weight is lost, gradients point one way."""
    model = dtem(make_host(), 20).train()
    outputs, grads = [], []
    for half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            features = model.forward_features(images)
            outputs.append(model.forward_head(features).float())
        torch.testing.assert_close(features.size.sum(1), torch.full((5,), 65.0), rtol=1e-6, atol=0)
        outputs[-1].square().sum().backward()
        grads.append([parameter.grad.flatten() for parameter in model.reduction.metric[0].parameters()])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0.01 * float(outputs[0].detach().abs().max()))
    for full, halved in zip(*grads, strict=True):
        assert torch.cosine_similarity(full, halved, dim=0) > 0.98
        assert float(halved.norm()) == pytest.approx(float(full.norm()), rel=0.1)


# The recipe


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 3, 64, 64, generator=generator), torch.randint(10, (8,), generator=generator)) for _ in range(4)
    ]


def test_fitting_changes_the_metric_only_and_the_loss_falls(make_host: Host, data: Any) -> None:
    host = make_host("vit_little_patch16_reg4_gap_256", img_size=64, drop_path_rate=0.5, proj_drop_rate=0.5)
    host.fc_norm.weight.requires_grad_(False)
    required = {name: p.requires_grad for name, p in host.named_parameters()}
    before = copy.deepcopy(host.state_dict())
    model = dtem(host.train(), 4)
    metric = [p.clone() for p in model.reduction.parameters()]
    # Labels that the model would give if nothing were merged: merging better brings the loss down.
    host.eval()
    with torch.no_grad():
        taught = [(images, (3 * host(images)).softmax(1)) for images, _ in data]
    host.train()
    losses = fit_dtem(model, taught, steps=40, lr=3e-2)
    assert len(losses) == 40 and all(np.isfinite(losses))
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 1e-3
    assert all(not torch.equal(p, old) for p, old in zip(model.reduction.parameters(), metric, strict=True))
    assert all(torch.equal(host.state_dict()[key], value) for key, value in before.items())
    assert {name: p.requires_grad for name, p in host.named_parameters()} == required
    assert all(p.grad is None for p in model.parameters())
    assert model.training and all(module.training for module in model.modules())


def test_the_frozen_model_drops_nothing(make_host: Host, data: Any) -> None:
    host = make_host(img_size=64, drop_path_rate=0.5, proj_drop_rate=0.5)
    losses = []
    for training in (True, False):
        torch.manual_seed(1)
        losses.append(fit_dtem(dtem(host.train(training), 4), data))
    assert losses[0] == losses[1]


def test_the_optimizer_is_the_recipes(make_host: Host, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    rates: list[float] = []
    norms: list[float] = []

    class Spy(torch.optim.AdamW):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(options)

        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            grads = [p.grad.norm() for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.stack(grads).norm()))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    model = dtem(make_host(img_size=64), 4)
    fit_dtem(model, data, steps=5, clip=1e-3)
    assert made == [{"lr": 1e-4, "weight_decay": 1e-4}]
    cosine = [1e-6 + (1e-4 - 1e-6) * (1 + np.cos(np.pi * step / 5)) / 2 for step in range(5)]
    assert rates == pytest.approx(cosine)
    assert max(norms) == pytest.approx(1e-3, rel=1e-2)
    assert not model.training


def test_batches_are_read_as_long_as_needed(make_host: Host, data: Any) -> None:
    model = dtem(make_host(img_size=64, depth=1), 4)
    read: list[int] = []

    def once(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data[:count]:
            read.append(1)
            yield batch

    still: dict[str, Any] = {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0}
    model.reduction.train()
    with torch.no_grad():
        each = [float(torch.nn.functional.cross_entropy(model(images), labels)) for images, labels in data]
    model.eval()
    assert fit_dtem(model, data, **still) == pytest.approx(each)
    assert fit_dtem(model, data, steps=6, **still) == pytest.approx([*each, *each[:2]])
    assert len(fit_dtem(model, once(4), steps=2)) == 2 and len(read) == 2
    with pytest.raises(ValueError, match="ended after 3 of 5 steps"):
        fit_dtem(model, once(3), steps=5)
    with pytest.raises(ValueError, match="give steps"):
        fit_dtem(model, once(3))
    with pytest.raises(ValueError, match="at least one batch"):
        fit_dtem(model, [])
    assert all(p.requires_grad for p in model.parameters()) and not model.training


def test_what_has_no_metric_is_refused(make_host: Host, data: Any) -> None:
    host = make_host()
    for model in (host, tome(host, 4)):
        with pytest.raises(ValueError, match=r"give what aptvit\.merging\.dtem returned"):
            fit_dtem(model, data)
    with pytest.raises(ValueError, match="feat_dim=0"):
        dtem(host, 4, feat_dim=0)
    with pytest.raises(ValueError, match="r=-1"):
        dtem(host, -1)
