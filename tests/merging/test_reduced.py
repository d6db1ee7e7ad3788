"""What all methods have in common: the host's parameters, timm's protocol, and the host where nothing is merged."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

import aptvit
from aptvit.merging import downscale, dtem, evit, random, tome
from aptvit.merging.reduced import HostView

Host = Callable[..., Any]

SLIM = {"embed_dim": 192, "num_heads": 3}

HOSTS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_tiny_patch16_224 qk norm": {"qk_norm": True, "init_values": 0.1},
    "vit_tiny_patch16_224 scaled": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},  # no position for the class token, layer scale
    "vit_small_patch14_reg4_dinov2": {"patch_size": 16},  # registers behind the class token
    "vit_little_patch16_reg4_gap_256": {},  # registers only, mean of patches
    "vit_base_patch16_siglip_224": SLIM,  # no prefix, attention pooling
    "vit_base_patch16_siglip_gap_224": SLIM,
    "vit_xsmall_patch16_clip_224": {},  # normalisation before the blocks
    "aimv2_large_patch14_224": {"embed_dim": 256, "num_heads": 2, "patch_size": 16},  # RMS norm, SwiGLU
    "vit_so400m_patch14_siglip_224": {"embed_dim": 144, "num_heads": 2, "patch_size": 16},
    "beit3_base_patch16_224": SLIM,
    "vit_base_patch32_plus_256": {**SLIM, "patch_size": 16},
}

METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    # method: where nothing is merged, where something is
    "tome": (tome, {"r": 0}, {"r": 9}),
    "dtem": (dtem, {"r": 0}, {"r": 9}),
    "evit": (evit, {"keep": 1.0}, {"keep": 0.6}),
    "random": (random, {"keep": 1.0}, {"keep": 0.6}),
    "downscale": (downscale, {"size": 128}, {"size": 64}),
}


def start_over(model: Any) -> None:
    """Let `random` choose what it chose first."""
    if hasattr(model, "num_batches"):
        model.num_batches = 0


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Callable[..., Any]:
    make, nothing, something = METHODS[request.param]
    return lambda host, merging=True: make(host, **(something if merging else nothing))


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_with_nothing_merged_it_is_the_host(make_host: Host, images: Tensor, name: str) -> None:
    host = make_host(name.split()[0], **HOSTS[name])
    expected, features = host(images), host.forward_features(images)
    pooled = host.forward_head(features, pre_logits=True)
    for key, (make, nothing, something) in METHODS.items():
        if key == "evit" and host.cls_token is None:
            continue
        model = make(host, **nothing)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
        got = model.forward_features(images)
        assert got.size is None
        torch.testing.assert_close(got.tokens, features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.forward_head(got, pre_logits=True), pooled, rtol=1e-4, atol=1e-4)
        assert model.tokens_per_block() == [features.shape[1]] * 2
        model = make(host, **something)
        logits = model(images)
        assert logits.shape == expected.shape and logits.isfinite().all()
        assert not torch.allclose(logits, expected, rtol=1e-2)


def test_gated_attention(make_host: Host, images: Tensor) -> None:
    host = make_host()
    for block in host.blocks:
        block.attn = Attention(
            192, 3, qkv_bias=True, gated=True, attn_head_dim=32, norm_layer=nn.LayerNorm, qk_norm=True
        )
    with torch.no_grad():
        torch.testing.assert_close(tome(host, 0)(images), host(images))


def test_attention_that_is_not_fused_in_the_host(make_host: Host, images: Tensor) -> None:
    host = make_host()
    for block in host.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        torch.testing.assert_close(evit(host, 1.0)(images), host(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_the_hosts(make_host: Host, images: Tensor, training: bool) -> None:
    """With nothing merged, the same random numbers drop the same things."""
    rates = {
        "attn_drop_rate": 0.3,
        "proj_drop_rate": 0.2,
        "pos_drop_rate": 0.1,
        "drop_rate": 0.4,
        "patch_drop_rate": 0.5,
    }
    host = make_host(drop_path_rate=0.5, **rates).train(training)
    outputs = []
    for model in (host, tome(host, 0)):
        torch.manual_seed(7)
        outputs.append(model(images))
    torch.testing.assert_close(*outputs)


def test_parameters_are_the_hosts_and_the_host_stays(make_host: Host, images: Tensor, method: Any) -> None:
    host = make_host().train()
    names = [name for name, _ in host.named_modules()]
    attributes = {name: set(vars(module)) for name, module in host.named_modules()}
    expected = host(images)
    state = copy.deepcopy(host.state_dict())
    model = method(host)
    assert model.training
    model.eval()(images)
    own = {name: p for name, p in model.named_parameters() if not name.startswith("reduction.metric.")}
    assert list(own) == [name for name, _ in host.named_parameters()]
    assert all(p is own[name] for name, p in host.named_parameters())
    assert {key for key in model.state_dict() if not key.startswith("reduction.metric.")} == set(state)
    assert host.training and torch.equal(host(images), expected)
    assert [name for name, _ in host.named_modules()] == names
    assert {name: set(vars(module)) for name, module in host.named_modules()} == attributes
    # and back: weights go from one to the other
    other = method(make_host())
    other.load_state_dict(model.state_dict())
    start_over(model)
    assert torch.equal(other.eval()(images), model(images))


def test_metric_parameters_have_one_prefix(make_host: Host) -> None:
    host = make_host()
    new = dtem(host, 4).state_dict().keys() - host.state_dict().keys()
    assert new == {f"reduction.metric.{i}.{what}" for i in (0, 1) for what in ("weight", "bias")}
    host.load_state_dict(dtem(host, 4).state_dict(), strict=False)


def test_modes(make_host: Host, method: Any) -> None:
    model = method(make_host())
    assert not any(module.training for module in (*model.modules(), model.vit, *model.vit.modules()))
    assert model.train() is model
    assert all(module.training for module in (*model.modules(), model.vit, *model.vit.modules()))


def test_gradients_reach_the_host(make_host: Host, images: Tensor, method: Any) -> None:
    host = make_host()
    method(host).train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in host.parameters())
    assert host.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_changes_memory_only(make_host: Host, images: Tensor, method: Any, training: bool) -> None:
    model = method(make_host(depth=3)).train(training)
    gradients = []
    runs: list[bool] = []
    model.blocks[1].norm1.register_forward_pre_hook(lambda *_: runs.append(enable))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        start_over(model)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)
    assert runs == [False, True, True]  # once more in the backward pass


def test_copies_are_their_own(make_host: Host, images: Tensor, method: Any) -> None:
    model = method(make_host())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(images), model(images))
            twin.head.weight.zero_()
            twin.head.bias.zero_()
            assert twin(images).abs().max() == 0
            assert model(images).abs().max() > 0
        start_over(model)


def test_the_classifier_can_be_replaced(make_host: Host, images: Tensor, method: Any) -> None:
    host = make_host()
    model = method(host)
    assert model.num_classes == 10 and model.get_classifier().weight is host.head.weight
    model.reset_classifier(3)
    assert (model.num_classes, host.num_classes) == (3, 10)
    assert model(images).shape == (5, 3) and host(images).shape == (5, 10)
    assert model.state_dict()["head.weight"].shape == (3, 192)
    model.reset_classifier(0, "avg")
    assert model(images).shape == (5, 192) and model.global_pool == "avg" and host.global_pool == "token"


def test_it_moves_as_one(make_host: Host, images: Tensor, method: Any) -> None:
    model = method(make_host()).double()
    assert model.vit.pos_embed.dtype == torch.float64
    assert model(images.double()).dtype == torch.float64
    model.bfloat16()
    out = model(images.bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_mixed_precision(make_host: Host, images: Tensor, method: Any) -> None:
    model = method(make_host())
    with torch.no_grad():
        expected = model(images)
        start_over(model)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(images)
    # Rounding may choose other tokens, so this is loose.
    assert torch.nn.functional.cosine_similarity(got.float(), expected).min() > 0.8


def test_whole_forward_compiles(make_host: Host, images: Tensor) -> None:
    """Without a graph break, and nothing read from the device."""
    host = make_host()
    for make, options in ((tome, {"r": 9}), (evit, {"keep": 0.6}), (dtem, {"r": 9}), (downscale, {"size": 64})):
        model = make(host, **options)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_base_patch16_rpn_224", SLIM, "block 0 is a ResPostBlock, supported is timm's Block with Attention"),
        ("vit_pwee_patch16_reg1_gap_256", {}, "block 0 is a ParallelScalingBlock"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "block 0 is a Block with DiffAttention"),
    ],
)
def test_other_blocks_are_refused(make_host: Host, name: str, options: dict[str, Any], reason: str) -> None:
    host = make_host(name, **options)
    for make in (tome, dtem) if host.cls_token is None else (tome, dtem, evit):
        with pytest.raises(ValueError, match=reason):
            make(host)


def test_other_models_are_refused(make_host: Host) -> None:
    hosts = [
        nn.Linear(2, 2),
        timm.create_model("eva02_tiny_patch14_224", depth=1),
        aptvit.adapt(make_host()),
        tome(make_host(), 2),
    ]
    for host in hosts:
        for make in (tome, evit, dtem, random, lambda host: downscale(host, 64)):
            if make is tome and isinstance(host, aptvit.AdaptivePatchTransformer):
                continue  # which is what it can merge further
            with pytest.raises(ValueError, match=f"cannot reduce the tokens of a {type(host).__name__}"):
                make(host)


def test_wrong_images_are_refused(make_host: Host, method: Any, images: Tensor) -> None:
    model = method(make_host())
    with pytest.raises(ValueError, match="stack images of one size"):
        model(images[0])
    with pytest.raises(ValueError, match="stack images of one size"):
        model(images[:, :2])
    with pytest.raises(ValueError, match="images in a list are not a batch"):
        model(list(images))
    if "Downscaled" in type(model).__name__:
        return
    with pytest.raises(ValueError, match="images of 64x128 do not fit a model for 128x128"):
        model(images[:, :, :64])
    flexible = tome(make_host(dynamic_img_size=True), 4)
    assert flexible(images[:, :, :64]).shape == (5, 10)
    assert flexible.tokens_per_block((4, 8)) == [33, 29]
    with pytest.raises(ValueError, match="60x128 are not made of whole patches of 16x16"):
        flexible(images[:, :, :60])


def test_the_frame_alone_is_the_host(make_host: Host, images: Tensor) -> None:
    host = make_host("deit_tiny_distilled_patch16_224")
    view = HostView(host)
    assert torch.equal(view(images), host(images))
    assert view.group_matcher() == host.group_matcher() and view.no_weight_decay() == host.no_weight_decay()
    assert view.embed_dim == 192 and view.num_prefix_tokens == 2
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        view.colour  # noqa: B018
