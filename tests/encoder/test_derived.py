"""Values derived from a host's parameters are never stale, whatever changed and however."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import aptvit

THRESHOLDS = (6.0, 6.0)
Change = Callable[[Any], object]


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def change_data(model: Any) -> None:
    model.patch_embed.proj.weight.data.mul_(1.5)


def change_in_place(model: Any) -> None:
    with torch.no_grad():
        model.coarse_embed.linear.weight.mul_(1.5)


def change_convolution(model: Any) -> None:
    model.coarse_embed.conv.weight.data[0, 0, 0, 1] += 0.5


def change_positions(model: Any) -> None:
    model.pos_embed.data.mul_(-1)


def change_one_pixel(model: Any) -> None:
    model.patch_embed.proj.weight.data[3, 1, 7, 9] += 0.5


def swap_module(model: Any) -> None:
    old = model.patch_embed.proj
    model.patch_embed.proj = nn.Conv2d(3, old.out_channels, old.kernel_size, old.stride)


def swap_parameter(model: Any) -> None:
    model.patch_embed.proj.weight = nn.Parameter(torch.randn_like(model.patch_embed.proj.weight) * 0.02)


def assign_state(model: Any) -> None:
    state = {name: value + 0.01 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def step_of(optimizer: Callable[..., torch.optim.Optimizer]) -> Change:
    def step(model: Any) -> None:
        with torch.enable_grad():
            sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer(model.parameters(), lr=0.1).step()
        model.zero_grad()

    return step


def parametrise(model: Any) -> None:
    parametrize.register_parametrization(model.patch_embed.proj, "weight", Doubled())


def tie(model: Any) -> None:
    model.coarse_embed.linear.weight = nn.Parameter(torch.randn(192, 192) * 0.02)
    model.head.weight = model.coarse_embed.linear.weight


CHANGES: dict[str, Change] = {
    "parameter.data": change_data,
    "in place": change_in_place,
    "one weight of the convolution": change_convolution,
    "positions": change_positions,
    "one weight": change_one_pixel,
    "another module": swap_module,
    "another parameter": swap_parameter,
    "load_state_dict(assign=True)": assign_state,
    "SGD": step_of(torch.optim.SGD),
    "AdamW": step_of(torch.optim.AdamW),
    "a parametrisation": parametrise,
    "tied weights": tie,
    "to double": lambda model: model.double(),
}


@pytest.fixture
def model(make_host: Callable[..., Any]) -> Any:
    return aptvit.adapt(make_host(num_classes=192), thresholds=THRESHOLDS, init="nonzero")


def rebuilt(model: Any) -> Any:
    """The same parameters in a model that has kept nothing yet."""
    return copy.deepcopy(model)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(model: Any, images: Tensor, change: str) -> None:
    before = model(images)
    assert torch.equal(model(images), before)
    CHANGES[change](model)
    after = model(images.to(model.pos_embed.dtype))
    assert torch.equal(after, rebuilt(model)(images.to(model.pos_embed.dtype)))
    assert change == "to double" or not torch.allclose(after, before, atol=1e-4)
    with torch.enable_grad():  # by the modules themselves, with nothing kept
        torch.testing.assert_close(model(images.to(after.dtype)), after, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_after_calls_that_merge_nothing(model: Any, images: Tensor, change: str) -> None:
    """Such calls use positions alone, and check no more than these."""
    model(images)
    CHANGES[change](model)
    images = images.to(model.pos_embed.dtype)
    assert torch.equal(model(images, keep=1.0), rebuilt(model)(images, keep=1.0))
    assert torch.equal(model(images), rebuilt(model)(images))


@torch.no_grad()
def test_nothing_is_computed_twice(model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from aptvit.layers.patch_embed import AffineMaps

    model(images)
    result: list[int] = []
    compose = AffineMaps._compose
    monkeypatch.setattr(AffineMaps, "_compose", lambda self, scale: result.append(scale) or compose(self, scale))
    for _ in range(3):
        model(images)
    assert result == []
    change_data(model)
    model(images)
    model(images)
    assert result == [1, 2]


@torch.no_grad()
def test_the_values_of_two_states_are_kept(model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model with an adapter that is switched on and off."""
    from aptvit.layers.patch_embed import AffineMaps

    weight = model.patch_embed.proj.weight
    states = [weight.detach().clone(), weight.detach() * 1.5]
    expected = []
    for state in states:
        weight.data.copy_(state)
        expected.append(model(images))
    monkeypatch.setattr(AffineMaps, "__init__", None)  # nothing is derived any more
    for state, logits in [*zip(states, expected, strict=True)] * 2:
        weight.data.copy_(state)
        assert torch.equal(model(images), logits)


@torch.no_grad()
def test_threads_wait_for_one_that_derives(model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from aptvit.layers.patch_embed import AffineMaps

    composed: list[int] = []
    compose = AffineMaps._compose
    monkeypatch.setattr(AffineMaps, "_compose", lambda self, scale: composed.append(scale) or compose(self, scale))
    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(lambda _: torch.no_grad()(model)(images), range(16))
    assert sorted(composed) == [1, 2] and all(torch.equal(first, other) for other in others)


@torch.no_grad()
def test_a_bounded_number_of_grids_is_kept(make_host: Callable[..., Any]) -> None:
    model = aptvit.adapt(make_host(dynamic_img_size=True), keep=0.6)
    for rows in range(2, 12):
        for cols in range(2, 6):
            model(torch.randn(1, 3, 16 * rows, 16 * cols))
    encoder = model.packed_encoder
    assert len(encoder.derived.fresh(encoder.derived.check(), waited=False).cached) == 32


@torch.no_grad()
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_nothing_of_the_original(model: Any, images: Tensor, again: Callable[[Any], Any]) -> None:
    expected = model(images)
    other = again(model)
    assert torch.equal(other(images), expected)
    change_data(other)
    assert not torch.allclose(other(images), expected, atol=1e-4)
    assert torch.equal(model(images), expected)


# Adapters


def lora(model: Any, targets: list[str] | str) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize("targets", [["proj"], r".*coarse_embed\.(linear|conv)", r".*(qkv|linear|patch_embed\.proj)"])
def test_lora_learns_counts_and_merges(model: Any, images: Tensor, targets: Any) -> None:
    plain = model(images).detach()
    adapted = lora(model, targets).train()
    adapted(images).square().mean().backward()
    for name, parameter in adapted.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.abs().max() > 0), name
    adapted.eval()
    with torch.no_grad():
        before = adapted(images)
        assert not torch.allclose(before, plain, atol=1e-3)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(images), plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapted(images), before, rtol=1e-5, atol=1e-5)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(images), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_host_with_lora_is_adapted_with_it(make_host: Callable[..., Any], images: Tensor) -> None:
    host = make_host()
    lora(host, ["proj"])
    host.eval()
    model = aptvit.adapt(host, keep=1.0)
    torch.testing.assert_close(model(images), host(images))
    merged = copy.deepcopy(host)
    for module in merged.modules():
        if hasattr(module, "merge"):
            module.merge()
    torch.testing.assert_close(model(images, keep=0.5), aptvit.adapt(merged, keep=0.5)(images), rtol=1e-4, atol=1e-4)


# Quantised modules


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation(model: Any, images: Tensor) -> None:
    expected = model(images)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.coarse_embed.linear) is not nn.Linear
    got = quantised(images)
    assert not torch.equal(got, expected)
    assert (got - expected).norm() < 0.1 * expected.norm()
    uniform = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model.adapter.vit), {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(quantised(images, thresholds=-1.0), uniform(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_torchao_quantisation(model: Any, images: Tensor) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    expected, quantised = model(images), copy.deepcopy(model)
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig())
    got = quantised(images)
    assert not torch.equal(got, expected)
    assert (got - expected).norm() < 0.05 * expected.norm()
    with torch.enable_grad():
        torch.testing.assert_close(quantised(images).detach(), got, rtol=1e-3, atol=1e-3)
